"""Judge from records which goals are reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A measured value and whether it is good enough."""

    value: str
    passed: bool

    def __str__(self) -> str:
        return f"{self.value} | {'**PASS**' if self.passed else '**FAIL**'}"


class Records:
    """The records of one device, found by what was measured."""

    def __init__(self, records: list[Record]):
        self.records = records

    def find(self, bench: str, **wanted: Any) -> Record:
        """Find the record of a case by its fields; raises LookupError where there is none."""
        for record in self.records:
            if all(record.get(key) == value for key, value in ({"bench": bench} | wanted).items()):
                return record
        raise LookupError(bench)


Goals = dict[str, Callable[[Records], Verdict]]


def implementation(record: Record, name: str) -> dict[str, Any]:
    """Return the entry of an implementation that was timed; raises LookupError otherwise."""
    entry = record["implementations"].get(name, {})
    if "ms" not in entry:
        raise LookupError(name)
    return entry


def p50(entry: dict[str, Any]) -> float:
    """Return the median time of an entry in milliseconds."""
    time: float = entry["ms"]["p50"]
    return time


def times_ours(record: Record, name: str) -> float:
    """Return how many times as long as ours an implementation takes."""
    return p50(implementation(record, name)) / p50(implementation(record, "ours"))


def peers_of(record: Record) -> dict[str, float]:
    """Return the median milliseconds of every peer that was timed and does the same work."""
    return {
        name: p50(entry)
        for name, entry in record["implementations"].items()
        if name != "ours" and "ms" in entry and entry["same_work"]
    }


def scratch_bytes(entry: dict[str, Any]) -> int:
    """Return the peak memory beyond inputs and gradients."""
    return int(entry["peak_bytes"] - entry["gradient_bytes"])


def at_most(value: float, limit: float, unit: str, digits: str = ".1f") -> Verdict:
    """Judge a value that must not exceed a limit."""
    return Verdict(f"{value:{digits}} {unit}", value <= limit)


def at_least(value: float, limit: float, unit: str, digits: str = ".2f") -> Verdict:
    """Judge a value that must reach a limit."""
    return Verdict(f"{value:{digits}}{unit}", value >= limit)


def judge(goals: Goals, records: list[Record]) -> dict[str, Verdict | None]:
    """Judge every goal; None where there is no measurement."""
    found = Records(records)
    verdicts: dict[str, Verdict | None] = {}
    for text, check in goals.items():
        try:
            verdicts[text] = check(found)
        except LookupError:
            verdicts[text] = None
    return verdicts
