"""Stopping politely: the first signal asks, the second kills."""

from __future__ import annotations

import signal
import sys
from types import FrameType


class StopRequested(Exception):
    """Raised out of a rollout when the run was asked to stop."""


class StopSignal:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between phases."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            sys.exit(128 + number)
        self.requested = True
        print("stopping: saving what is done first (signal again to stop at once)", file=sys.stderr, flush=True)

    def check(self) -> None:
        """Raise StopRequested when a signal has come."""
        if self.requested:
            raise StopRequested
