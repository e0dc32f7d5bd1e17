"""Examples as scripts of their own, in forks that need not import PyTorch again."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path

from tests.helpers.forked_runs import ROOT, ForkedProcess, finish


def output(script: str, *arguments: str, one_layer: bool = False) -> str:
    """Return what a script, named by its path in the repository, prints in a fork; perhaps its model has one layer."""
    return finish(ForkedProcess(_with_one_layer if one_layer else run_script, str(ROOT / script), arguments))


def run_script(path: str, arguments: tuple[str, ...]) -> int:
    """Do what `python path arguments` does."""
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
    return 0


def _with_one_layer(path: str, arguments: tuple[str, ...]) -> int:
    from atpo_fast.train import from_config

    build_model = from_config.build_model
    from_config.build_model = lambda config, *others: build_model(replace(config, layers=1), *others)
    return run_script(path, arguments)
