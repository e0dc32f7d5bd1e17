"""Choose the replica of a request: the one that has its tree's prefix unless it is much busier, else the least busy.

A replica works on a bounded number of requests; more wait in its queue. One that is idle takes from the longest queue.
All of this runs on one event loop and never waits while it changes something.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from atpo_fast.engines.server.protocol import ServerError


@dataclass(eq=False, slots=True)
class Replica:
    """One server; `up` says whether it may be given requests."""

    url: str
    up: bool = False
    running: int = 0  # number of requests in progress
    queue: deque[PendingRequest] = field(default_factory=deque)
    model: str = ""  # name of the model to ask for
    asked: bool = False  # whether its health has been checked
    problem: str = ""  # reason why it is down
    look: asyncio.Event = field(default_factory=asyncio.Event)  # event that triggers a health check at once

    @property
    def load(self) -> int:
        """Number of requests that it has, waiting ones included."""
        return self.running + len(self.queue)


@dataclass(eq=False, slots=True)
class PendingRequest:
    """A request that waits for its turn."""

    tree: Hashable
    granted: asyncio.Future[Replica]


class Router:
    """The choice of a replica for every request.

    Args:
        replicas: the servers.
        max_requests: number of requests that a replica works on at once.
        slack: number of requests that a tree's replica may have more than the least busy one before the tree moves.
    """

    def __init__(self, replicas: Sequence[Replica], max_requests: int, slack: int):
        self.replicas, self.max_requests, self.slack = list(replicas), max_requests, slack
        self.parked: deque[PendingRequest] = deque()  # requests that came while no replica is up
        self.down_since: float | None = time.monotonic()
        self._homes: dict[Hashable, Replica] = {}

    async def place(self, tree: Hashable, avoid: Replica | None = None) -> Replica:
        """Wait until a replica takes a request of `tree`, and return it; `leave` has to follow.

        `avoid` gets the request only where no other replica is up. Raise ServerError when `give_up` is called.
        """
        pending = PendingRequest(tree, asyncio.get_running_loop().create_future())
        self._enqueue(pending, avoid)
        self._grant()
        try:
            return await pending.granted
        except asyncio.CancelledError:
            if pending.granted.done() and not pending.granted.cancelled() and pending.granted.exception() is None:
                self.leave(pending.granted.result())
            for queue in (self.parked, *(replica.queue for replica in self.replicas)):
                with suppress(ValueError):
                    queue.remove(pending)
            raise

    def leave(self, replica: Replica) -> None:
        """Count a request of the replica as ended, which may admit one that waits."""
        replica.running -= 1
        self._grant()

    def forget(self, tree: Hashable) -> None:
        """Forget which replica holds the prefix of a finished tree."""
        self._homes.pop(tree, None)

    def set_up(self, replica: Replica) -> None:
        """Give requests to a replica from now on."""
        replica.up, replica.problem, self.down_since = True, "", None
        waiting, self.parked = self.parked, deque()
        for pending in waiting:
            self._enqueue(pending)
        self._grant()

    def set_down(self, replica: Replica, problem: str) -> None:
        """Give a replica no more requests, and those that wait for it to others."""
        replica.up, replica.problem = False, problem
        if self.down_since is None and not any(other.up for other in self.replicas):
            self.down_since = time.monotonic()
        waiting, replica.queue = replica.queue, deque()
        for pending in waiting:
            self._enqueue(pending)
        self._grant()

    def give_up(self, message: str) -> None:
        """Fail all requests that wait for any replica to come up."""
        while self.parked:
            pending = self.parked.popleft()
            if not pending.granted.done():
                pending.granted.set_exception(ServerError(message))

    def _enqueue(self, pending: PendingRequest, avoid: Replica | None = None) -> None:
        able = [replica for replica in self.replicas if replica.up]
        able = [replica for replica in able if replica is not avoid] or able
        if not able:
            self.parked.append(pending)
            return
        least = min(able, key=lambda replica: replica.load)
        home = self._homes.get(pending.tree)
        if home not in able or home.load > least.load + self.slack:
            home = self._homes[pending.tree] = least
        home.queue.append(pending)

    def _grant(self) -> None:
        """Start what can start: each replica's own requests first, then what waits for one that is full."""
        for replica in self.replicas:
            while replica.queue and self._has_room(replica):
                self._start(replica.queue.popleft(), replica)
        for replica in self.replicas:
            longest = max(self.replicas, key=lambda other: len(other.queue))
            while longest.queue and self._has_room(replica):
                self._start(longest.queue.popleft(), replica)

    def _has_room(self, replica: Replica) -> bool:
        return replica.up and replica.running < self.max_requests

    def _start(self, pending: PendingRequest, replica: Replica) -> None:
        if not pending.granted.done():
            replica.running += 1
            pending.granted.set_result(replica)
