"""The live sessions of a process, no more than a number of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from atpo_fast.environment.sessions.counts import SessionCounts
from atpo_fast.environment.sessions.driver import Driver, Opened
from atpo_fast.environment.sessions.states import LiveSession, Place, StateTree


class Room:
    """Sessions that are open. Its methods belong to the event loop of `Sessions`.

    A session is parked at the place whose state it is in, or works. Where there is no room for another, the parked one
    that worked longest ago is closed; where none is parked, the newcomer waits.

    Args:
        driver: closes sessions.
        size: number of sessions that live at once.
        counts: gets `opened`, `closed` and `evicted`.
        full: called when a session is closed for lack of room.
    """

    def __init__(self, driver: Driver, size: int, counts: SessionCounts, full: Callable[[], None]) -> None:
        self._driver, self._size, self._counts, self._full = driver, size, counts, full
        self.live: dict[LiveSession, None] = {}  # the one that worked longest ago first
        self.peak = 0  # greatest number of them since `peak` was set
        self._making = 0  # sessions on their way
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()

    async def add(self, tree: StateTree, make: Callable[[], Awaitable[Opened]]) -> LiveSession:
        """Add the session that `make` makes, as soon as there is room for it. Raises what `make` raises."""
        async with self._changed:
            while len(self.live) + self._making >= self._size and not self._evict():
                await self._changed.wait()
            self._making += 1
        try:
            live = LiveSession(*(await make()), tree)
            self._counts.opened += 1
            self.live[live] = None
            tree.live.add(live)
            self.peak = max(self.peak, len(self.live))
            return live
        finally:
            self._making -= 1
            await self._tell()

    def park(self, live: LiveSession, place: Place) -> None:
        """Leave a session at the place whose state it is in; where its tree has ended, close it."""
        if place.tree.closed or live not in self.live:
            self.close(live)
            return
        live.place, place.live = place, live
        self.live[live] = self.live.pop(live)

    def take(self, place: Place) -> LiveSession | None:
        """Take the session that is parked at a place away from there."""
        live, place.live = place.live, None
        if live is not None:
            live.place = None
        return live

    def close(self, live: LiveSession) -> None:
        """Close a session, beside what else there is to do; not if that was done before."""
        if live not in self.live:
            return
        del self.live[live]
        live.tree.live.discard(live)
        if live.place is not None:
            self.take(live.place)
        self._counts.closed += 1
        task = asyncio.get_running_loop().create_task(self._close(live))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close_all(self) -> None:
        """Close all sessions, and wait until they are."""
        for live in list(self.live):
            self.close(live)
        if self._closing:
            await asyncio.wait(self._closing)

    def _evict(self) -> bool:
        """Close the parked session that worked longest ago; returns whether there was one."""
        for live in self.live:
            if live.place is not None and not live.place.lock.locked():
                self._counts.evicted += 1
                self._full()
                self.close(live)
                return True
        return False

    async def _close(self, live: LiveSession) -> None:
        await self._driver.close_session(live.session)
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
