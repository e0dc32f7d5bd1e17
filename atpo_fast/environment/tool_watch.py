"""Counts of what became of the calls of each tool, and a watch that stops a run whose tool answers nothing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from atpo_fast.common.errors import ToolFailureError
from atpo_fast.environment.answers import Outcome

_LOG = logging.getLogger(__name__)
_LOUD_SHARE = 0.1  # share of a roll-out's calls whose failure is worth a line
_ENOUGH = 4  # failed calls without any other that end a run


@dataclass(slots=True)
class ToolCounts:
    """Numbers of calls of one tool that were run since its tool box was made; identical calls at once are one call.

    `calls`: all of them. `failures`: those that no try answered. Of these, `timeouts` and `empty`: the last try took
    too long, or answered nothing. `refused`: calls answered with what is wrong with them (ToolError), no failures.
    """

    calls: int = 0
    failures: int = 0
    timeouts: int = 0
    empty: int = 0
    refused: int = 0

    def add(self, outcome: Outcome) -> None:
        """Count a call with the outcome of its last try."""
        self.calls += 1
        if isinstance(outcome, str):
            return
        self.failures += outcome.kind != "refused"
        self.timeouts += outcome.kind == "timeout"
        self.empty += outcome.kind == "empty"
        self.refused += outcome.kind == "refused"

    def since(self, earlier: ToolCounts) -> ToolCounts:
        """Return what was counted after `earlier`."""
        return ToolCounts(
            **{field.name: getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)}
        )

    def copy(self) -> ToolCounts:
        """Return the counts as they are now."""
        return ToolCounts(**asdict(self))


class ToolWatch:
    """A watch over the calls of some tools, from one roll-out to the next.

    Args:
        counts: the counts of each tool, which go on counting.
        last_failures: the text of each tool's last failure.
    """

    def __init__(self, counts: Mapping[str, ToolCounts], last_failures: Mapping[str, str]) -> None:
        self._counts, self._last = counts, last_failures
        self._before = {name: found.copy() for name, found in counts.items()}
        self._row: Counter[str] = Counter()  # failed calls since the last call that did not fail

    def settle(self) -> None:
        """Look at the calls since the last time, and warn of tools that failed often.

        Raises:
            ToolFailureError: all calls of a tool failed, and there were at least 4 since the last that did not.
        """
        dead = []
        for name, total in self._counts.items():
            new = total.since(self._before[name])
            self._before[name] = total.copy()
            if not new.calls:
                continue
            self._row[name] = self._row[name] + new.failures if new.failures == new.calls else 0
            if new.failures >= _LOUD_SHARE * new.calls:
                _LOG.warning("%s", self._words(name, new))
            if self._row[name] >= _ENOUGH:
                dead.append(name)
        if dead:
            raise ToolFailureError(
                f"no call of {' and '.join(map(repr, dead))} was answered, {self._row[dead[0]]} in a row; last: "
                f"{self._last.get(dead[0], 'unknown')} Mend the tool (one call of your own shows whether it works), or "
                "raise tools.timeout_seconds where it is slow; the same command then goes on from the newest checkpoint"
            )

    def _words(self, name: str, new: ToolCounts) -> str:
        details = [f"{n} {what}" for n, what in ((new.timeouts, "timed out"), (new.empty, "empty")) if n]
        listed = f" ({', '.join(details)})" if details else ""
        last = self._last.get(name, "unknown")
        return f"tool {name!r}: {new.failures} of {new.calls} calls failed{listed}; last: {last}"
