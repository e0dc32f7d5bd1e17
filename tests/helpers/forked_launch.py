"""The launch of a verb, with DeepSpeed's own launcher, in forks that need not import PyTorch again."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from atpo_fast.commands import launcher
from tests.helpers.forked_runs import ForkedStart

TWO_CPU_RANKS = launcher.Placement("cpu", ["0", "1"])


def variables(record: Path) -> dict[str, str]:
    """Return the variables under which a program in `record` stands in for training."""
    return {"PYTHONPATH": str(record / "package"), "RECORD": str(record)}


def launch_in_fork(record: Path, word: str) -> int:
    """Launch the ranks that lie in `record`; for a `ForkedProcess`, of which DeepSpeed's launcher is a fork."""
    os.environ |= variables(record)
    os.chdir(record / "package")
    launcher.start_ranks = _start_ranks  # type: ignore[assignment]  # what it returns has the two attributes that are used
    return launcher.launch("train", "c.yaml", [word], TWO_CPU_RANKS)


def _start_ranks(command: Sequence[str], environment: Mapping[str, str]) -> ForkedStart:
    """Start DeepSpeed's launcher as its command says."""
    return ForkedStart(_run_module, command[2], command[3:], dict(environment), launcher.prepare_child(os.getpid()))


def _run_module(module: str, words: Sequence[str], environment: dict[str, str], prepare: Callable[[], None]) -> None:
    os.setsid()
    prepare()
    os.environ.clear()
    os.environ |= environment
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__")
