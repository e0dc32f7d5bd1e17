"""A uvicorn server that closes connections on which nothing gets done."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from atpo_fast.config.retrieval import ServerLimits

_SWEEP_TICKS = 10  # of uvicorn's ticks of 0.1 s


class LimitedServer(uvicorn.Server):
    """A uvicorn server with limits on time, which calls `started` once it answers requests.

    A connection that has sent no whole head of a request for `limits.read_seconds` is closed, and so is one whose
    request has been neither answered nor read to the end of its answer for `limits.answer_seconds`. Uvicorn itself
    closes only those that are silent after an answer.

    Args:
        config: uvicorn's.
        started: called once requests are answered.
        limits: times.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        started: Callable[[], None],
        limits: ServerLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(config)
        self._tell = started
        self._limits = limits
        self._clock = clock
        self._since: dict[
            Any, tuple[tuple[Any, bool], float]
        ] = {}  # connection: last request, whether it is open, since

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and tell it."""
        await super().startup(sockets)
        if self.started:
            self._tell()

    async def on_tick(self, counter: int) -> bool:
        """Look at all connections once a second."""
        if counter % _SWEEP_TICKS == 0:
            self.sweep()
        return await super().on_tick(counter)

    def sweep(self) -> None:
        """Close the connections that have done the same for too long."""
        now = self._clock()
        former, self._since = self._since, {}
        for connection in list(self.server_state.connections):
            request = getattr(connection, "cycle", None)  # of the request whose head has come, if any
            doing = request, request is not None and not request.response_complete
            seen, since = former.get(connection, (doing, now))
            if seen != doing:
                since = now
            if now - since > (self._limits.answer_seconds if doing[1] else self._limits.read_seconds):
                connection.transport.abort()
            else:
                self._since[connection] = (doing, since)
