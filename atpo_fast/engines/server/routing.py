"""Which replica a request goes to: the one that has its tree's prefix unless it is much busier, else the least busy.

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
    """One server. `up`: it may be given requests."""

    url: str
    up: bool = False
    running: int = 0  # requests that it works on
    queue: deque[Ticket] = field(default_factory=deque)
    model: str = ""  # name to ask for
    asked: bool = False  # its health has been checked at least once
    problem: str = ""  # why it is down
    look: asyncio.Event = field(default_factory=asyncio.Event)  # set: check its health now

    @property
    def load(self) -> int:
        """Requests that it has, waiting ones included."""
        return self.running + len(self.queue)


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that waits for its turn."""

    tree: Hashable
    granted: asyncio.Future[Replica]


class Router:
    """Places requests.

    Args:
        replicas: the servers.
        max_requests: what a replica works on at once.
        slack: a tree moves to the least busy replica when its own has over so many requests more.
    """

    def __init__(self, replicas: Sequence[Replica], max_requests: int, slack: int):
        self.replicas, self.max_requests, self.slack = list(replicas), max_requests, slack
        self.parked: deque[Ticket] = deque()  # while no replica is up
        self.down_since: float | None = time.monotonic()
        self._homes: dict[Hashable, Replica] = {}

    async def place(self, tree: Hashable, avoid: Replica | None = None) -> Replica:
        """Wait until a replica takes a request of `tree`; `leave` has to follow.

        `avoid` gets it only where no other is up. Raises ServerError as `give_up` says.
        """
        ticket = Ticket(tree, asyncio.get_running_loop().create_future())
        self._enqueue(ticket, avoid)
        self._grant()
        try:
            return await ticket.granted
        except asyncio.CancelledError:
            if ticket.granted.done() and not ticket.granted.cancelled() and ticket.granted.exception() is None:
                self.leave(ticket.granted.result())
            for queue in (self.parked, *(replica.queue for replica in self.replicas)):
                with suppress(ValueError):
                    queue.remove(ticket)
            raise

    def leave(self, replica: Replica) -> None:
        """A request is over."""
        replica.running -= 1
        self._grant()

    def forget(self, tree: Hashable) -> None:
        """A tree is finished."""
        self._homes.pop(tree, None)

    def set_up(self, replica: Replica) -> None:
        """The replica may be given requests."""
        replica.up, replica.problem, self.down_since = True, "", None
        waiting, self.parked = self.parked, deque()
        for ticket in waiting:
            self._enqueue(ticket)
        self._grant()

    def set_down(self, replica: Replica, problem: str) -> None:
        """The replica gets no more requests; those that wait for it go elsewhere."""
        replica.up, replica.problem = False, problem
        if self.down_since is None and not any(other.up for other in self.replicas):
            self.down_since = time.monotonic()
        waiting, replica.queue = replica.queue, deque()
        for ticket in waiting:
            self._enqueue(ticket)
        self._grant()

    def give_up(self, message: str) -> None:
        """Let all requests fail that wait for any replica to come up."""
        while self.parked:
            ticket = self.parked.popleft()
            if not ticket.granted.done():
                ticket.granted.set_exception(ServerError(message))

    def _enqueue(self, ticket: Ticket, avoid: Replica | None = None) -> None:
        able = [replica for replica in self.replicas if replica.up]
        able = [replica for replica in able if replica is not avoid] or able
        if not able:
            self.parked.append(ticket)
            return
        least = min(able, key=lambda replica: replica.load)
        home = self._homes.get(ticket.tree)
        if home not in able or home.load > least.load + self.slack:
            home = self._homes[ticket.tree] = least
        home.queue.append(ticket)

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

    def _start(self, ticket: Ticket, replica: Replica) -> None:
        if not ticket.granted.done():
            replica.running += 1
            ticket.granted.set_result(replica)
