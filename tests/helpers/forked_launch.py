"""The launch of a verb, with DeepSpeed's own launcher, in forks that need not import PyTorch again."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from atpo_fast.commands import launcher
from tests.helpers.forked_runs import FORK

TWO_CPU_RANKS = launcher.Placement("cpu", ["0", "1"])


def variables(record: Path) -> dict[str, str]:
    """Return the variables under which a program in `record` stands in for training."""
    return {"PYTHONPATH": str(record / "package"), "RECORD": str(record)}


def launch_in_fork(record: Path, word: str) -> int:
    """Launch the ranks that lie in `record`; for a `ForkedProcess`, of which DeepSpeed's launcher is a fork."""
    os.environ |= variables(record)
    os.chdir(record / "package")
    launcher.start_ranks = ForkedLauncher  # type: ignore[assignment,misc]  # the two attributes that are used
    return launcher.launch("train", "c.yaml", [word], TWO_CPU_RANKS)


class ForkedLauncher:
    """What `launcher.start_ranks` returns: a process, here a fork, that does what its command says."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        prepare = launcher.prepare_child(os.getpid())
        self._process = FORK.Process(target=self._run, args=(command[2], command[3:], dict(environment), prepare))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    @staticmethod
    def _run(module: str, words: list[str], environment: dict[str, str], prepare: Callable[[], None]) -> None:
        os.setsid()
        prepare()
        os.environ.clear()
        os.environ |= environment
        sys.argv = [module, *words]
        runpy.run_module(module, run_name="__main__")
