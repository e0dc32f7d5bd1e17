"""Run tests in forks of a process that has imported all libraries, with a fault in one module or without.

The modules of the program itself are imported by each fork, so that every user of the faulty module gets the fault.
"""

from __future__ import annotations

import ast
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from bench.mutants.mutate import Mutant
from bench.mutants.parts import ROOT, Part, module_name

_FRESH = ("atpo_fast", "atpo_kernels", "tests")  # imported by each fork, so that all users of a module get its fault
_OWN = (*_FRESH, "bench")
_WITHOUT = ("cacheprovider", "benchmark", "unraisableexception", "threadexception")
_OPTIONS = ("-x", "-q", *(word for name in _WITHOUT for word in ("-p", f"no:{name}")))
_FIRST_CPU_SECONDS = 900  # of the tests without a fault, traced
_MEMORY = 16 << 30  # a loop without end must not fill the machine
_AT_IMPORT = ""  # coverage's name for what runs outside of tests


@dataclass(slots=True)
class Baseline:
    """The tests of a part without any fault.

    Attributes:
        seconds: CPU seconds of each test.
        runs: file -> line -> tests that run it; `""` among them where it runs when the module is imported.
        libraries: modules of others that the tests import.
        kills: number of mutants that each test noticed so far.
    """

    seconds: dict[str, float]
    runs: dict[str, dict[int, list[str]]]
    libraries: list[str]
    kills: dict[str, int] = field(default_factory=dict)

    def tests_of(self, file: Path, lines: Iterable[int]) -> list[str]:
        """List the tests that run any of the lines: those that noticed most so far first, then the fastest."""
        found = {test for line in lines for test in self.runs.get(str(file), {}).get(line, ())}
        tests = self.seconds if _AT_IMPORT in found else found
        return sorted(tests, key=lambda test: (-self.kills.get(test, 0), self.seconds[test], test))


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the tests noticed a fault, the test that did, and the CPU seconds that it took."""

    killed: bool
    by: str
    seconds: float


def warm(libraries: Iterable[str]) -> None:
    """Import libraries here, so that forks need not; one that cannot be imported alone is left to the tests."""
    for name in libraries:
        try:
            importlib.import_module(name)
        except Exception:
            continue
    gc.collect()
    gc.freeze()  # so that no fork copies these objects to look at them


def baseline(part: Part) -> Baseline:
    """Run the tests of a part without a fault, and note which test runs which line.

    Raises RuntimeError if one fails.
    """
    answer, code, _ = _in_fork(lambda: _watched(part), _FIRST_CPU_SECONDS)
    if answer is None or "seconds" not in answer:
        raise RuntimeError(f"the tests fail without any fault (code {code}); run `pytest {' '.join(part.tests)}`")
    runs = {file: {int(line): tests for line, tests in lines.items()} for file, lines in answer["runs"].items()}
    return Baseline(answer["seconds"], runs, answer["libraries"])


def try_mutant(base: Baseline, file: Path, mutant: Mutant) -> Verdict:
    """Run the tests that could notice a fault until one fails. Loops without end count as noticed."""
    tests = base.tests_of(file, mutant.lines)
    if not tests:
        return Verdict(killed=False, by="", seconds=0.0)
    limit = 20 + 5 * sum(base.seconds[test] for test in tests)
    answer, code, seconds = _in_fork(lambda: _faulty(file, mutant, tests), limit)
    by = (answer or {}).get("failed") or ("the import" if answer is not None else "a limit of time or memory")
    if code:
        base.kills[by] = base.kills.get(by, 0) + 1
    return Verdict(killed=bool(code), by=by if code else "", seconds=seconds)


def _in_fork(work: Callable[[], tuple[int, dict[str, Any]]], cpu_seconds: float) -> tuple[Any, int, float]:
    """Do work in a fork: (its answer or None, exit code, CPU seconds)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as answer:
        child = os.fork()
        if child == 0:
            try:
                _confine(int(cpu_seconds) + 1)
                code, found = work()
                json.dump(found, answer)
                answer.flush()
                os._exit(code)
            except BaseException:
                traceback.print_exc()
                os._exit(99)
        _, status = os.waitpid(child, 0)
        answer.seek(0)
        text = answer.read()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (json.loads(text) if text else None), os.waitstatus_to_exitcode(status), seconds


def _confine(cpu_seconds: int) -> None:
    """Set limits and silence for this process, a fork.

    Hypothesis draws the same examples in every fork, and shrinks none.
    """
    from hypothesis import Phase, settings

    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    gc.disable()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("mutants", derandomize=True, database=None, deadline=None, phases=phases)
    settings.load_profile("mutants")


class _Watch:
    """A plugin for pytest that runs tests in a given order and notes their CPU time and the first failure."""

    def __init__(self, order: Sequence[str] = (), at_test: Callable[[str], object] | None = None) -> None:
        self.place = {test: number for number, test in enumerate(order)}
        self.at_test = at_test
        self.seconds: dict[str, float] = {}
        self.failed = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Put the tests in order."""
        if self.place:
            items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda item: self.place[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note the start of a test."""
        if self.at_test is not None:
            self.at_test(nodeid)
        self.seconds[nodeid] = -_cpu_seconds()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Note the end of a test."""
        self.seconds[nodeid] += _cpu_seconds()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note a failure."""
        if report.failed:
            self.failed = self.failed or report.nodeid


def _watched(part: Part) -> tuple[int, dict[str, Any]]:
    """Run all tests of a part; answers with what `Baseline` holds."""
    import coverage
    import pytest

    files = [str(file) for file in part.files()]
    tracer = coverage.Coverage(data_file=None, include=files, config_file=False, messages=False)
    tracer.start()
    watch = _Watch(at_test=tracer.switch_context)
    chosen = ["-k", f"not {part.deselected}"] if part.deselected else []
    code = int(pytest.main([*part.tests, *_OPTIONS, *chosen], plugins=[watch]))
    tracer.stop()
    if code:
        return code, {"failed": watch.failed}
    data = tracer.get_data()
    libraries = sorted(name for name in sys.modules if name.split(".")[0] not in _OWN and not name.startswith("_"))
    runs = {file: data.contexts_by_lineno(file) for file in files}
    return code, {"seconds": watch.seconds, "runs": runs, "libraries": libraries}


def _faulty(file: Path, mutant: Mutant, tests: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Run tests with a fault until one fails; answers with its name."""
    import pytest

    for name in [name for name in sys.modules if name.split(".")[0] in _FRESH]:
        del sys.modules[name]
    sys.meta_path.insert(0, MutatedModule(module_name(file), file, mutant.tree()))
    watch = _Watch(tests)
    files = sorted({test.split("::")[0] for test in tests})
    code = int(pytest.main([*files, *_OPTIONS], plugins=[watch]))
    return code, {"failed": watch.failed}


class MutatedModule(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module, and loads it from a syntax tree."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self.name, self.path, self.tree = name, path, tree

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find the module."""
        if name != self.name:
            return None
        places = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(name, self.path, loader=self, submodule_search_locations=places)

    def exec_module(self, module: ModuleType) -> None:
        """Run the faulty code."""
        code: CodeType = compile(self.tree, str(self.path), "exec")
        exec(code, module.__dict__)


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
