"""Judging goals from records."""

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
        """The record of a case by its fields; raises LookupError where there is none."""
        for record in self.records:
            if all(record.get(key) == value for key, value in ({"bench": bench} | wanted).items()):
                return record
        raise LookupError(bench)


Goals = dict[str, Callable[[Records], Verdict]]


def implementation(record: Record, name: str) -> dict[str, Any]:
    """An entry that was timed; raises LookupError otherwise."""
    entry = record["implementations"].get(name, {})
    if "ms" not in entry:
        raise LookupError(name)
    return entry


def p50(entry: dict[str, Any]) -> float:
    """Milliseconds."""
    return entry["ms"]["p50"]


def times_ours(record: Record, name: str) -> float:
    """How many times as long as ours an implementation takes."""
    return p50(implementation(record, name)) / p50(implementation(record, "ours"))


def peers_of(record: Record) -> dict[str, float]:
    """p50 milliseconds of all that were timed and do the same work, but ours."""
    return {
        name: p50(entry)
        for name, entry in record["implementations"].items()
        if name != "ours" and "ms" in entry and entry["same_work"]
    }


def scratch_bytes(entry: dict[str, Any]) -> int:
    """Peak memory beyond inputs and gradients."""
    return entry["peak_bytes"] - entry["gradient_bytes"]


def at_most(value: float, limit: float, unit: str, digits: str = ".1f") -> Verdict:
    """With its unit."""
    return Verdict(f"{value:{digits}} {unit}", value <= limit)


def at_least(value: float, limit: float, unit: str, digits: str = ".2f") -> Verdict:
    """With its unit."""
    return Verdict(f"{value:{digits}}{unit}", value >= limit)


def judge(goals: Goals, records: list[Record]) -> dict[str, Verdict | None]:
    """Verdicts; None where there is no measurement."""
    found, verdicts = Records(records), {}
    for text, check in goals.items():
        try:
            verdicts[text] = check(found)
        except LookupError:
            verdicts[text] = None
    return verdicts
