"""A plugin: a test run ends with its CPU time and the tests that took most of it, and slow tests must say why.

CPU time is that of this process and of all that it started, running or ended. It is read after each test, so that what
pytest does between two of them counts with the second. A fixture counts with the first test that uses it, and a
grandchild whose parent died before it is not counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from contextlib import suppress
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from time import perf_counter
from typing import NamedTuple

import pytest

TICKS = os.sysconf("SC_CLK_TCK")  # of /proc, in a second
SHOWN = 20  # tests
LEAST = 1.0  # seconds of CPU time that a test must have taken to be shown


class Cost(NamedTuple):
    """Seconds that a test took."""

    cpu: float
    wall: float
    name: str


def cpu_seconds() -> float:
    """Return the CPU time of this process, of its ended children, and of the running ones with theirs (Linux)."""
    own = sum(use.ru_utime + use.ru_stime for use in map(getrusage, (RUSAGE_SELF, RUSAGE_CHILDREN)))
    return own + sum(_seconds(child) for child in _children(os.getpid()))


def _seconds(process: int) -> float:
    """Return the CPU time of a running process and of all that it started; 0 if it has just ended."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    own = sum(int(field) for field in fields[11:15]) / TICKS  # utime, stime, and both of its ended children: proc(5)
    return own + sum(_seconds(child) for child in _children(process))


def _children(process: int) -> list[int]:
    """List the running children of a process; none where the system does not tell."""
    found: list[int] = []
    with suppress(OSError):  # the process has just ended
        for thread in os.listdir(f"/proc/{process}/task"):
            with suppress(OSError), open(f"/proc/{process}/task/{thread}/children", "rb") as file:  # or the thread has
                found += map(int, file.read().split())
    return found


class CpuTimes:
    """Measures every test and writes the summary; refuses slow tests that do not say why."""

    def __init__(self) -> None:
        self.costs: list[Cost] = []
        self._read: float | None = None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Refuse tests that are marked slow without a reason."""
        unexplained = [
            item.nodeid
            for item in items
            for mark in item.iter_markers("slow")
            if not str(mark.kwargs.get("reason", "")).strip()
        ]
        if unexplained:
            raise pytest.UsageError(
                'say in a word why a test is slow, as in pytest.mark.slow(reason="starts two servers"): '
                + ", ".join(unexplained)
            )

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Measure a test with its setup and teardown."""
        before, wall = cpu_seconds() if self._read is None else self._read, perf_counter()
        result = yield
        self._read = cpu_seconds()
        self.costs.append(Cost(self._read - before, perf_counter() - wall, item.nodeid))
        return result

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Write the most expensive tests, the folders, and the total."""
        if not self.costs:
            return
        terminalreporter.section("CPU time")
        for cost in self.most_expensive():
            terminalreporter.line(f"{cost.cpu:7.1f} s CPU {cost.wall:7.1f} s wall  {cost.name}")
        for folder, seconds in self.by_folder():
            terminalreporter.line(f"{seconds:7.1f} s CPU  {folder}")
        tests, total = sum(cost.cpu for cost in self.costs), cpu_seconds()
        terminalreporter.line(
            f"{total / 60:.1f} CPU-minutes in all: {tests / 60:.1f} in {len(self.costs)} tests, "
            f"{(total - tests) / 60:.1f} in imports and collection"
        )

    def most_expensive(self) -> list[Cost]:
        """Return the tests that are worth showing, the most expensive first."""
        return sorted((cost for cost in self.costs if cost.cpu >= LEAST), reverse=True)[:SHOWN]

    def by_folder(self) -> list[tuple[str, float]]:
        """Return the CPU time of each folder of tests, the most expensive first."""
        seconds: Counter[str] = Counter()
        for cost in self.costs:
            seconds[cost.name.partition("::")[0].rpartition("/")[0] or "."] += cost.cpu  # type: ignore[assignment]
        return [(folder, cpu) for folder, cpu in seconds.most_common() if cpu >= LEAST]
