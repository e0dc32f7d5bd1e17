"""What a roll-out reports about itself: counters, phases and progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

REPORT_SECONDS = 0.5  # longest time between two reports of progress

ProgressCallback = Callable[[int, int, int], None]


class Timer(Protocol):
    """The part of a phase timer that the tree search uses."""

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Time the `with` block under a name."""
        ...


@dataclass(slots=True)
class RolloutCounters:
    """Counters of a tree search since it was built: the one definition of each of these numbers.

    `turns`: turns that the engine has written, each counted once however many leaves share it. `tool_calls`: calls
    submitted to the tools (those over the call limit are not). `failed_tool_calls`: those of them that were answered
    with an error. `timed_out_turns`: turns that stayed leaves because their round had waited too long for their tools
    (`rollout.straggler_seconds`). `trees`: finished trees. `failed_trees`: those of them without any leaf that the
    policy ended itself.
    """

    turns: int = 0
    tool_calls: int = 0
    failed_tool_calls: int = 0
    timed_out_turns: int = 0
    trees: int = 0
    failed_trees: int = 0


@dataclass(slots=True)
class Progress:
    """Reports to the live display when the numbers change, and at least every REPORT_SECONDS."""

    callback: ProgressCallback | None
    total_leaves: int
    leaves: int = 0
    decoded_tokens: int = 0
    _reported: tuple[int, int] = (0, 0)
    _reported_at: float = 0.0

    def report(self) -> None:
        """Call the callback if it is time to. It may raise, to stop the roll-out."""
        now, numbers = time.monotonic(), (self.leaves, self.decoded_tokens)
        if self.callback is None or (numbers == self._reported and now - self._reported_at < REPORT_SECONDS):
            return
        self._reported, self._reported_at = numbers, now
        self.callback(self.leaves, self.total_leaves, self.decoded_tokens)


def timed(timer: Timer | None, name: str) -> AbstractContextManager[object]:
    """Time a block as a phase of `timer`, if there is one."""
    return nullcontext() if timer is None else timer.phase(name)
