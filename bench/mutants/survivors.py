"""What the mutation check found: `results.json`, and SURVIVORS.md made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.mutants.mutate import mutants
from bench.mutants.parts import PARTS, equivalent_mutants, name_of

BAR = 0.9
_RESULTS = Path(__file__).parent / "results.json"
_PAGE = Path(__file__).parent / "SURVIVORS.md"
_HEAD = """# Mutants that survive

Written by `make mutants`, which puts one small fault at a time into the loss, the credit, the packing and the reward,
and runs the tests that run the faulty line until one fails. Nine of ten have to be noticed. One of so many mutants is
tried, always the same ones. Those that no input tells from the code are left out; `equivalent.json` gives the reasons.

| part | one of | left out | tried | killed | share | CPU-minutes | commit |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Survivor:
    """A mutant that no test noticed.

    Attributes:
        name: file, function and fault.
        line: line when it was tried.
        is_run: whether any test of the part runs that line.
    """

    name: str
    line: int
    is_run: bool


@dataclass(slots=True)
class Outcome:
    """What the check of a part found."""

    commit: str
    every: int
    seconds: float
    tried: int = 0
    killed: int = 0
    equivalent: list[str] = field(default_factory=list)
    survivors: list[Survivor] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the tried mutants that the tests noticed."""
        return self.killed / max(1, self.tried)


def keep(outcomes: Mapping[str, Outcome], results: Path = _RESULTS, page: Path = _PAGE) -> None:
    """Put outcomes in the place of earlier ones of the same parts, and write the page of all."""
    earlier = json.loads(results.read_text()) if results.exists() else {}
    found = {name: _read(fields) for name, fields in earlier.items()} | dict(outcomes)
    found = {name: found[name] for name in PARTS if name in found}
    results.write_text(json.dumps({name: asdict(outcome) for name, outcome in found.items()}, indent=1) + "\n")
    page.write_text(page_of(found, equivalent_mutants()))


def page_of(found: Mapping[str, Outcome], reasons: Mapping[str, str]) -> str:
    """Write the page: a table of the parts, the survivors, the equivalent ones."""
    lines = [_HEAD.rstrip("\n")]
    for name, outcome in found.items():
        same, minutes = len(outcome.equivalent), outcome.seconds / 60
        lines.append(
            f"| {name} | {outcome.every} | {same} | {outcome.tried} | {outcome.killed} | {outcome.share:.1%} | "
            f"{minutes:.1f} | {outcome.commit} |"
        )
    lines += ["", "## Survivors", ""]
    for name, outcome in found.items():
        lines += [f"{name.capitalize()}:" if outcome.survivors else f"{name.capitalize()}: none.", ""]
        lines += [f"* {s.name} (line {s.line}{'' if s.is_run else ', which no test runs'})" for s in outcome.survivors]
        lines += [""] if outcome.survivors else []
    lines += ["## Equivalent", ""]
    lines += [f"* {name}. {reason}" for name, reason in reasons.items()]
    return "\n".join(lines) + "\n"


def unknown_names() -> list[str]:
    """List the names of equivalent mutants that no mutant has."""
    known = {
        name_of(file, mutant.place, mutant.what)
        for part in PARTS.values()
        for file in part.files()
        for mutant in mutants(file.read_text())
    }
    return sorted(set(equivalent_mutants()) - known)


def _read(fields: Mapping[str, object]) -> Outcome:
    values = dict(fields)
    survivors = values.pop("survivors")
    assert isinstance(survivors, list)
    return Outcome(**values, survivors=[Survivor(**survivor) for survivor in survivors])  # type: ignore[arg-type]
