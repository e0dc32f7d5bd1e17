"""What a roll-out tells about itself: counters, phases and progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

REPORT_SECONDS = 0.5  # progress is reported at least so often

ProgressCallback = Callable[[int, int, int], None]


class Timer(Protocol):
    """What the turn loop asks of a phase timer."""

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Time a block under a name."""
        ...


@dataclass(slots=True)
class RolloutCounters:
    """Cumulative counts of one turn loop.

    `tool_calls`: calls handed to the tools (those over the limit are not). `failed_tool_calls`: the part of them
    answered with what went wrong. `straggling_turns`: turns that stayed leaves because the round waited too long for
    their tools (`rollout.straggler_seconds`). `failed_trees`: trees without a leaf that the policy ended itself.
    """

    turns: int = 0
    tool_calls: int = 0
    failed_tool_calls: int = 0
    straggling_turns: int = 0
    trees: int = 0
    failed_trees: int = 0


@dataclass(slots=True)
class Progress:
    """What the live display is told, when it changes and at least every REPORT_SECONDS."""

    callback: ProgressCallback | None
    total_leaves: int
    leaves: int = 0
    decoded_tokens: int = 0
    _told: tuple[int, int] = (0, 0)
    _told_at: float = 0.0

    def report(self) -> None:
        """Call the callback if it is time to. It may raise, to stop the roll-out."""
        now, numbers = time.monotonic(), (self.leaves, self.decoded_tokens)
        if self.callback is None or (numbers == self._told and now - self._told_at < REPORT_SECONDS):
            return
        self._told, self._told_at = numbers, now
        self.callback(self.leaves, self.total_leaves, self.decoded_tokens)


def timed(timer: Timer | None, name: str) -> AbstractContextManager[object]:
    """A phase of the timer, if there is one."""
    return nullcontext() if timer is None else timer.phase(name)
