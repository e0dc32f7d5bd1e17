"""`python -m bench.mutants`: try every mutant against the tests of its part, and say which survive.

One process imports the libraries. For each mutant it forks a child that loads the mutated module in the place of the
real one and runs the tests of the part until the first failure. A mutant that takes ten times the CPU time of the
tests counts as noticed.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from bench.mutants.mutate import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
_LIBRARIES = ("numpy", "torch", "transformers", "tokenizers", "pydantic", "hypothesis", "pytest", "httpx")
_CPU_SECONDS = 30  # more than the tests of a part take, times ten where they take more
_SURVIVED, _KILLED = "survived", "killed"


@dataclass(frozen=True, slots=True)
class Part:
    """Modules, and the tests that ought to notice any fault in them."""

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    deselected: str = ""  # tests that look for slowness, which no mutant here brings


PARTS = {
    "loss": Part(
        ("kernels/atpo_kernels/turn_policy_loss/torch_impl.py",),
        ("tests/kernels/test_turn_policy_loss.py", "tests/kernels/test_turn_clip.py", "tests/objective"),
    ),
    "credit": Part(("atpo_fast/credit/*.py",), ("tests/credit",)),
    "packing": Part(("atpo_fast/packing/*.py",), ("tests/packing/test_packing.py", "tests/packing")),
    "reward": Part(
        (
            "atpo_fast/environment/reward.py",
            "atpo_fast/environment/extraction.py",
            "atpo_fast/environment/rewards/*.py",
        ),
        (
            "tests/environment/test_reward.py",
            "tests/environment/test_extraction.py",
            "tests/environment/test_rewards.py",
        ),
        "quadratic",
    ),
}


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module, and loads it from a syntax tree."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self.name, self.path, self.tree = name, path, tree

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        places = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(name, self.path, loader=self, submodule_search_locations=places)

    def exec_module(self, module: ModuleType) -> None:
        code: CodeType = compile(self.tree, str(self.path), "exec")
        exec(code, module.__dict__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the check, print a line for each survivor, and fail where a part has less than 90 % killed."""
    parser = argparse.ArgumentParser(prog="python -m bench.mutants", description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--every", type=int, default=1, help="try one of so many mutants (default: all)")
    parser.add_argument("--record", type=Path, help="file to append a line to for each mutant")
    options = parser.parse_args(arguments)
    for name in _LIBRARIES:
        if importlib.util.find_spec(name):
            importlib.import_module(name)
    shares = [_check(name, options.every, options.record) for name in options.parts]
    sys.exit(any(share < 0.9 for share in shares))


def _check(name: str, every: int, record: Path | None) -> float:
    """Try the mutants of a part; returns the share that the tests noticed."""
    part = PARTS[name]
    status, limit = _tested(part, None, _CPU_SECONDS * 10)
    if status != _SURVIVED:
        sys.exit(f"{name}: the tests fail without any mutant; run `pytest {' '.join(part.tests)}`")
    tried = killed = number = 0
    for path in sorted(file for pattern in part.modules for file in ROOT.glob(pattern)):
        for mutant in mutants(path.read_text()):
            number += 1
            if number % every:
                continue
            status, _ = _tested(part, (path, mutant), max(_CPU_SECONDS, 10 * limit))
            tried, killed = tried + 1, killed + (status == _KILLED)
            line = f"{path.relative_to(ROOT)}:{mutant.line}: {mutant.what}"
            if status == _SURVIVED:
                print(f"  survived: {line}", flush=True)
            if record is not None:
                with record.open("a") as file:
                    file.write(f"{name}\t{status}\t{line}\n")
    print(f"{name}: {killed} of {tried} mutants killed ({killed / max(1, tried):.0%})", flush=True)
    return killed / max(1, tried)


def _tested(part: Part, fault: tuple[Path, Mutant] | None, cpu_seconds: float) -> tuple[str, float]:
    """Run the tests of a part in a child, with a fault or without: (whether they noticed, CPU seconds)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if child == 0:
        _run_tests(part, fault, int(cpu_seconds))
    _, status = os.waitpid(child, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (_KILLED if status else _SURVIVED), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _run_tests(part: Part, fault: tuple[Path, Mutant] | None, cpu_seconds: int) -> None:
    """Run the tests in this process, a child; never returns."""
    import pytest

    try:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = tempfile.gettempdir()
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        os.chdir(ROOT)
        sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
        if fault is not None:
            path, mutant = fault
            sys.meta_path.insert(0, _Mutated(_module_name(path), path, mutant.tree))
        chosen = ["-k", f"not {part.deselected}"] if part.deselected else []
        code = pytest.main([*part.tests, "-x", "-q", "-p", "no:cacheprovider", *chosen])
        os._exit(int(code))
    except BaseException:
        os._exit(99)


def _module_name(path: Path) -> str:
    """Return the name that a file of the packages is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


if __name__ == "__main__":
    main()
