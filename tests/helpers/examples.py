"""Examples as scripts of their own, in forks that need not import PyTorch again."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from tests.helpers.forked_runs import ROOT, ForkedProcess, finish


def output(script: str, *arguments: str) -> str:
    """Return what a script of the repository, named by its path in it, prints in a fork."""
    return finish(ForkedProcess(run_script, str(ROOT / script), arguments))


def run_script(path: str, arguments: tuple[str, ...]) -> int:
    """Do what `python path arguments` does."""
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
    return 0
