"""The sessions of a process: branches act in the states of their turns, and everything is closed on every path.

One event loop, on a thread of its own, holds all of it; branches of any trees act side by side there. A branch that
acts takes the session that is parked in its state away, where nobody else will need that state; otherwise it gets a
fork. So a search that never returns to earlier turns forks nothing, and a fork is made only when a branch really acts.
A state without a parked session is reached by replay (`reach.py`).
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from atpo_fast.common.errors import first_line
from atpo_fast.common.event_loop import EventLoopThread
from atpo_fast.config import EnvironmentConfig
from atpo_fast.environment.arguments import JsonSchema
from atpo_fast.environment.session import Message, SessionFactory
from atpo_fast.environment.sessions.check import Way, choose
from atpo_fast.environment.sessions.counts import SessionCounts
from atpo_fast.environment.sessions.driver import Driver, LostError
from atpo_fast.environment.sessions.reach import Reach, Reporter
from atpo_fast.environment.sessions.room import Room
from atpo_fast.environment.sessions.states import LiveSession, Outcome, Place, StateTree
from atpo_fast.environment.tags import ToolCall

T = TypeVar("T")
_CLOSE_SECONDS = 30.0  # longest time that the end of the process waits for sessions to close


@dataclass(frozen=True, slots=True)
class SessionAnswer:
    """The answer to an action, and the state after it; `lost` where the branch cannot go on."""

    outcome: Outcome
    place: Place
    lost: bool = False


class Sessions:
    """The sessions of a process, whose methods may be called from any thread.

    Args:
        factory: opens a session.
        settings: the section `environment`.
        max_chars: number of characters to which an answer is cut.
        task, seed: those of the sessions that the check at the start opens.

    Attributes:
        way: how sessions are forked.
        schemas: schemas of what the policy can call; one for plain actions.
        counts: numbers since the start.
        scoring: whether anybody wants scores.

    Raises:
        ConfigError: the factory fails, or the way to fork that was asked for does not pass its check.
    """

    def __init__(
        self,
        factory: SessionFactory,
        settings: EnvironmentConfig,
        *,
        max_chars: int,
        task: Mapping[str, Any],
        seed: int,
    ) -> None:
        tell = Reporter()
        self._tell = tell
        self.counts = SessionCounts()
        self.scoring = True
        self._driver = Driver(factory, settings, max_chars)
        self._room = Room(
            self._driver,
            settings.sessions,
            self.counts,
            lambda: tell("full", "more than environment.sessions=%d are wanted at once", settings.sessions),
        )
        self._slots = asyncio.Semaphore(max(1, min(settings.concurrency, settings.sessions // 2)))
        self._thread = EventLoopThread("sessions")
        self._working: set[asyncio.Task[Any]] = set()
        self._close = weakref.finalize(self, _close_all, self._thread, self._room, self._driver, self._working)
        try:
            chosen = self._thread.submit(choose(self._driver, settings, task, seed)).result()
        except BaseException:
            self.close()
            raise
        self.way: Way = chosen.way
        self.schemas: list[JsonSchema] = self._driver.schemas
        self._reach = Reach(self._driver, self._room, chosen, settings, self.counts, tell)

    # --- on the threads of the callers

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what the policy can call, which are its tags."""
        return tuple(schema["function"]["name"] for schema in self.schemas)

    @property
    def scores(self) -> bool:
        """Whether sessions score trajectories, and anybody wants to know."""
        return self._driver.scores and self.scoring

    @property
    def live(self) -> int:
        """Number of sessions that are open."""
        return len(self._room.live)

    @property
    def hung(self) -> int:
        """Number of threads that hang in a session's code."""
        return self._driver.hung

    def take_peak(self) -> int:
        """Return the greatest number of sessions that were open at once since this was last asked."""
        peak, self._room.peak = self._room.peak, len(self._room.live)
        return peak

    def begin(self, tasks: Sequence[tuple[str, Mapping[str, Any], int]]) -> list[StateTree]:
        """Open a session for each (name, task, seed), side by side, and return their trees of states.

        Where one cannot be opened, that is told, and its tree has no opening; the first action tries again.
        """
        trees = [StateTree(name, dict(task), seed) for name, task, seed in tasks]
        try:
            self._thread.submit(self._begin(trees)).result()
        except BaseException:
            self.release(trees)
            raise
        return trees

    def act(self, place: Place, call: ToolCall, *, keep: bool) -> Future[SessionAnswer]:
        """Act in the state of `place`; `keep` says whether that state may be needed once more.

        The future fails only where the tree was released.
        """
        return self._thread.submit(self._of_tree(place.tree, self._act(place, call, keep)))

    def score(self, place: Place, transcript: list[Message]) -> Future[float | None]:
        """Score the trajectory that ends in the state of `place`; None where it gets no score."""
        return self._thread.submit(self._of_tree(place.tree, self._score(place, transcript)))

    def release(self, trees: Sequence[StateTree]) -> None:
        """Stop what works for trees, and close their sessions."""
        with suppress(RuntimeError):  # all were closed before
            self._thread.loop.call_soon_threadsafe(self._release, list(trees))

    def close(self) -> None:
        """Close all sessions and end the threads."""
        self._close()

    # --- on the loop

    async def _begin(self, trees: Sequence[StateTree]) -> None:
        async def one(tree: StateTree) -> None:
            async with self._slots:
                try:
                    self._room.park(await self._reach.open(tree), tree.root)
                except Exception as error:
                    self._lose(tree, error)

        await asyncio.gather(*(self._of_tree(tree, one(tree)) for tree in trees))

    async def _of_tree(self, tree: StateTree, work: Coroutine[Any, Any, T]) -> T:
        """Work as a task of a tree, which ends with it."""
        task = asyncio.current_task()
        assert task is not None
        tree.tasks.add(task)
        self._working.add(task)
        try:
            if tree.closed:
                work.close()
                raise asyncio.CancelledError
            return await work
        finally:
            tree.tasks.discard(task)
            self._working.discard(task)

    def _release(self, trees: Sequence[StateTree]) -> None:
        for tree in trees:
            tree.closed = True
            for task in tree.tasks:
                task.cancel()
            for live in list(tree.live):
                self._room.close(live)

    async def _act(self, place: Place, call: ToolCall, keep: bool) -> SessionAnswer:
        """Act from a place, and park the session at the place that this leads to."""
        async with self._slots:
            try:
                live = await self._reach.take(place, keep=keep)
                outcome = await self._act_in(live, call)
            except Exception as error:
                self._lose(place.tree, error)
                text = f"Tool({call.tool}) failed: {first_line(error)}"
                return SessionAnswer(Outcome(text, ok=False), place, lost=True)
            after = Place(place.tree, place, call, outcome)
            if outcome.done and not self.scores:
                self._room.close(live)
            else:
                self._room.park(live, after)
            return SessionAnswer(outcome, after)

    async def _act_in(self, live: LiveSession, call: ToolCall) -> Outcome:
        begun = time.monotonic()
        self.counts.actions += 1
        try:
            return await self._driver.act(live, call)
        except BaseException:  # it is lost, or its tree has ended
            self._room.close(live)
            raise
        finally:
            self.counts.action_seconds += time.monotonic() - begun

    async def _score(self, place: Place, transcript: list[Message]) -> float | None:
        """Score in the state of a place; the session stays there."""
        async with self._slots, place.lock:
            try:
                if place.live is None:
                    self._room.park(await self._reach.replay(place), place)
                return None if place.live is None else await self._driver.score(place.live, transcript)
            except Exception as error:
                self.counts.failed_scores += 1
                self._tell("score", "question %r: its session gave no score: %s", place.tree.name, first_line(error))
                if place.live is not None and isinstance(error, LostError):
                    self._room.close(place.live)
                return None

    def _lose(self, tree: StateTree, error: Exception) -> None:
        self.counts.lost += 1
        self._tell("lost", "question %r: a session is lost: %s", tree.name, first_line(error))


def _close_all(thread: EventLoopThread, room: Room, driver: Driver, working: set[asyncio.Task[Any]]) -> None:
    """Stop what works, close all sessions, then end the threads; a session that hangs is left to itself."""

    async def end() -> None:
        for task in working:
            task.cancel()
        if working:
            await asyncio.wait(working)
        await room.close_all()

    if not thread.is_current:
        with suppress(Exception):
            thread.submit(end()).result(timeout=_CLOSE_SECONDS)
    thread.close()
    driver.close()
