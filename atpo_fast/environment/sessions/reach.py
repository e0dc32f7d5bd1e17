"""Bring a session into a state: take the one that is parked there, fork it, or repeat the actions on the path."""

from __future__ import annotations

import logging
import time
from collections import Counter

from atpo_fast.common.errors import first_line
from atpo_fast.config import EnvironmentConfig
from atpo_fast.environment.sessions.check import Chosen
from atpo_fast.environment.sessions.counts import SessionCounts
from atpo_fast.environment.sessions.driver import Driver, LostError
from atpo_fast.environment.sessions.room import Room
from atpo_fast.environment.sessions.states import LiveSession, Place, StateTree

_LOG = logging.getLogger(__name__)
_TOLD = 5  # number of times that trouble of one kind is told


class ReplayMismatchError(LostError):
    """A repeated action was answered otherwise than at first."""


class Reporter:
    """Warns of trouble, of each kind a few times."""

    def __init__(self) -> None:
        self._told: Counter[str] = Counter()

    def __call__(self, kind: str, message: str, *details: object) -> None:
        """Warn, unless trouble of this kind was told often enough."""
        self._told[kind] += 1
        if self._told[kind] <= _TOLD:
            _LOG.warning(message + (" (not told again)" if self._told[kind] == _TOLD else ""), *details)


class Reach:
    """The ways to a state. Its methods belong to the event loop of `Sessions`.

    Args:
        driver: opens, forks and acts.
        room: the live sessions.
        chosen: how sessions are forked.
        settings: the section `environment`.
        counts: gets forks, replays and mismatches.
        tell: warns of trouble.
    """

    def __init__(
        self,
        driver: Driver,
        room: Room,
        chosen: Chosen,
        settings: EnvironmentConfig,
        counts: SessionCounts,
        tell: Reporter,
    ) -> None:
        self._driver, self._room, self._chosen, self._settings = driver, room, chosen, settings
        self._counts, self._tell = counts, tell

    async def open(self, tree: StateTree) -> LiveSession:
        """Open a session of a tree; its opening has to be that of the first one.

        Raises:
            ReplayMismatchError: the opening differs, and the settings say that the branch ends.
        """
        live = await self._room.add(tree, lambda: self._driver.open(tree.task, tree.seed))
        opening = self._driver.opening(live.session)
        if not tree.opened:
            tree.opening, tree.opened = opening, True
        elif opening != tree.opening:
            try:
                self._mismatch(tree, "the opening", str(tree.opening), str(opening))
            except ReplayMismatchError:
                self._room.close(live)
                raise
        return live

    async def take(self, place: Place, *, keep: bool) -> LiveSession:
        """Return a session in the state of a place, for the caller alone.

        With `keep` a session that is parked there stays, if it can be forked.

        Raises:
            LostError: as `replay`.
        """
        async with place.lock:
            if place.live is not None:
                if not keep or not self._keeps(place):
                    parked = self._room.take(place)
                    assert parked is not None
                    return parked
                forked = await self._fork(place.live)
                if forked is not None:
                    return forked
        return await self.replay(place)

    async def replay(self, place: Place) -> LiveSession:
        """Bring a session into the state of a place by repeating actions, from as near a state as can be forked.

        Raises:
            ReplayMismatchError: an action was answered otherwise than at first, and the settings say that the branch
                ends.
            LostError: the session hangs, or its environment is gone.
        """
        begun, path = time.monotonic(), list(place.path())  # from the place up to the root
        live, start = await self._nearest(path)
        try:
            for step in reversed(path[:start]):
                await self._repeat(live, step)
        except BaseException:
            self._room.close(live)
            raise
        if place.parent is not None:
            self._counts.forks_replay += 1
            self._counts.fork_seconds += time.monotonic() - begun
        return live

    async def _nearest(self, path: list[Place]) -> tuple[LiveSession, int]:
        """Return a session in the state of the nearest place above the first of `path`, and that place's number."""
        for number, above in enumerate(path[1:], start=1):
            if above.live is not None and self._keeps(above) and not above.lock.locked():
                async with above.lock:
                    forked = await self._fork(above.live)
                if forked is not None:
                    return forked, number
        return await self.open(path[0].tree), len(path) - 1

    def _keeps(self, place: Place) -> bool:
        """Tell whether a state is kept by forking it. The root is opened again, if that leads to the same state."""
        forks = self._chosen.way in ("native", "copy")
        return forks and (place.parent is not None or not self._chosen.reproducible)

    async def _fork(self, parked: LiveSession) -> LiveSession | None:
        """Fork a parked session; None where that fails, which is told."""
        way = self._chosen.way
        assert way == "native" or way == "copy"
        begun = time.monotonic()
        try:
            forked = await self._room.add(parked.tree, lambda: self._driver.fork(parked, way))
        except Exception as error:
            self._counts.failed_forks += 1
            self._tell("fork", "question %r: a fork (%s) failed: %s", parked.tree.name, way, first_line(error))
            return None
        finally:
            self._counts.fork_seconds += time.monotonic() - begun
        if way == "native":
            self._counts.forks_native += 1
        else:
            self._counts.forks_copy += 1
        return forked

    async def _repeat(self, live: LiveSession, step: Place) -> None:
        assert step.action is not None and step.outcome is not None
        self._counts.replayed += 1
        outcome = await self._driver.act(live, step.action)
        if outcome.differs(step.outcome):
            self._mismatch(step.tree, repr(step.action.argument[:80]), step.outcome.text, outcome.text)

    def _mismatch(self, tree: StateTree, action: str, was: str, now: str) -> None:
        what = f"{action} was answered by {was[:80]!r} at first, and when it was repeated by {now[:80]!r}"
        self._counts.mismatches += 1
        self._tell("mismatch", "question %r: %s", tree.name, what)
        if self._settings.on_mismatch == "end":
            raise ReplayMismatchError(what)
