"""The user's code behind a session: open, act, fork, score and close it, each off this thread and within its time."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Literal

from atpo_fast.common.errors import ConfigError
from atpo_fast.common.event_loop import LazyEventLoop
from atpo_fast.config import EnvironmentConfig
from atpo_fast.environment.answers import Failure, answer_text, failure_of
from atpo_fast.environment.arguments import ArgumentError, JsonSchema, SchemaArguments
from atpo_fast.environment.session import Message, SessionFactory, SessionLostError, keeps_state, scores
from atpo_fast.environment.sessions.random_state import RandomState
from atpo_fast.environment.sessions.states import LiveSession, Outcome
from atpo_fast.environment.sessions.threads import HangError, Threads
from atpo_fast.environment.tags import ToolCall

_LOG = logging.getLogger(__name__)
_CLOSE_SECONDS = 10.0  # longest time of `close`, where an action may take longer
_MAX_HUNG = 32  # threads that never ended; with more no session is opened any more

Fork = Literal["native", "copy"]
Opened = tuple[Any, RandomState | None]  # a session, and the state of the global generators where they are guarded


class LostError(Exception):
    """The session cannot be used any more: it hangs, or its environment is gone."""


class Driver:
    """Calls the methods of sessions; its coroutines belong to one event loop.

    Args:
        factory: opens a session.
        settings: time limits, and the tag of plain actions.
        max_chars: number of characters to which an answer is cut.

    Attributes:
        guarded: whether each session has the global random generators to itself.
        schemas: schemas of the tools, those of the first session; one with a single text for plain actions.
    """

    def __init__(self, factory: SessionFactory, settings: EnvironmentConfig, max_chars: int) -> None:
        self._factory, self._settings, self._max_chars = factory, settings, max_chars
        self._threads = Threads("session")
        self._coroutines = LazyEventLoop("session coroutines")
        self.guarded = bool(settings.guard_random)
        self.schemas: list[JsonSchema] = []
        self.scores = False
        self._arguments: Mapping[str, SchemaArguments] = {}
        self._plain = True

    @property
    def hung(self) -> int:
        """Number of threads that hang in a session."""
        return self._threads.hung

    def close(self) -> None:
        """Wait for what is on its way, and end the event loop of coroutines."""
        self._threads.join(_CLOSE_SECONDS)
        self._coroutines.close()

    def learn(self, session: Any) -> None:
        """Take the tools of a session, which are those of all.

        Raises:
            ConfigError: a tool that cannot be described.
        """
        tools = list(getattr(session, "tools", None) or [])
        self._plain, self.scores = not tools, scores(session)
        self.schemas = tools or [_plain_schema(self._settings.action)]
        try:
            self._arguments = {
                tool["function"]["name"]: SchemaArguments(tool["function"]["parameters"]) for tool in self.schemas
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"environment.factory={self._settings.factory}: a tool of its sessions is not in OpenAI's form "
                f'{{"type": "function", "function": {{name, description, parameters}}}}: {error!r}'
            ) from error

    async def open(self, task: Mapping[str, Any], seed: int) -> Opened:
        """Open a session. Raises what the factory raises, and LostError where it hangs."""
        if self._threads.hung > _MAX_HUNG:
            raise LostError(f"{self._threads.hung} calls of sessions never returned, so no further one is opened")
        random = RandomState.seeded(seed) if self.guarded else None
        opening = partial(self._factory, copy.deepcopy(dict(task)), seed)
        return await self._run(opening, random, self._close_late), random

    def opening(self, session: Any) -> str | None:
        """Return the opening of a session, cut; None where it has none."""
        opening = getattr(session, "opening", None)
        text = None if opening is None else answer_text(opening, self._max_chars)
        return text if isinstance(text, str) else None

    async def act(self, live: LiveSession, call: ToolCall) -> Outcome:
        """Act in a session; what it raises is an answer too.

        Raises:
            LostError: it hangs, or its environment is gone.
        """
        if self._plain:
            act = partial(live.session.step, call.argument)
        else:
            try:
                act = partial(live.session.call, call.tool, self._arguments[call.tool].parse(call.argument))
            except ArgumentError as error:
                return Outcome(f"Tool({call.tool}) was not called: {error}", ok=False)
        try:
            return self._outcome(await self._run(act, live.random))
        except (LostError, SessionLostError) as error:
            raise LostError(str(error) or type(error).__name__) from error
        except Exception as error:
            return Outcome(f"Tool({call.tool}) {failure_of(error).text}", ok=False)

    async def fork(self, live: LiveSession, way: Fork) -> Opened:
        """Return another session in the state of `live`. Raises what the session's code raises."""
        random = live.random.copy() if live.random is not None else None
        aside = random.copy() if random is not None else None  # what the fork itself draws is nobody's
        session = live.session
        if way == "copy":
            return await self._run(partial(copy.deepcopy, session), aside, self._close_late), random
        if not keeps_state(session):
            return await self._run(session.fork, aside, self._close_late), random
        state = copy.deepcopy(await self._run(session.get_state, aside))
        other, _ = await self.open(live.tree.task, live.tree.seed)
        try:
            await self._run(partial(other.set_state, state), aside)
        except BaseException:
            await self.close_session(other)
            raise
        return other, random

    async def score(self, live: LiveSession, transcript: list[Message]) -> float | None:
        """Return the score of a trajectory, None where there is none. Raises what the session's code raises."""
        score = await self._run(partial(live.session.score, transcript), live.random)
        return None if score is None else _finite(score)

    async def close_session(self, session: Any) -> None:
        """Close a session; a failure is only told."""
        close = getattr(session, "close", None)
        if close is None:
            return
        try:
            await self._run(close, None, seconds=min(_CLOSE_SECONDS, self._settings.timeout_seconds))
        except Exception as error:
            _LOG.warning("a session could not be closed: %s", failure_of(error).text)

    async def _run(
        self,
        function: Callable[[], Any],
        random: RandomState | None,
        late: Callable[[Any], None] | None = None,
        seconds: float | None = None,
    ) -> Any:
        """Call a function on a thread, and await what it returns if that is to be awaited."""
        seconds = seconds or self._settings.timeout_seconds
        end = time.monotonic() + seconds
        work = function if random is None else partial(random.run, function)
        try:
            result = await self._threads.run(work, seconds, late)
            if not inspect.isawaitable(result):
                return result
            waiting = asyncio.wrap_future(self._coroutines.submit(_awaited(result)))
            return await asyncio.wait_for(waiting, max(0.0, end - time.monotonic()))
        except (HangError, asyncio.TimeoutError, TimeoutError) as error:
            if not isinstance(error, HangError) and time.monotonic() < end:
                raise  # one of the session's own
            raise LostError(f"no answer within {seconds:g} seconds") from error

    def _close_late(self, session: Any) -> None:
        """Close a session that came when nobody waited for it any more; on its thread."""
        with contextlib.suppress(Exception):
            closed = session.close()
            if inspect.isawaitable(closed):
                self._coroutines.submit(_awaited(closed))

    def _outcome(self, result: Any) -> Outcome:
        """Check what an action returned, and cut its text. Raises TypeError or ValueError for what is no Result."""
        text, reward = getattr(result, "text", None), getattr(result, "reward", None)
        if text is None:
            raise TypeError(f"the session returned {type(result).__name__}, and not a Result")
        shown = answer_text(text, self._max_chars)
        return Outcome(
            "" if isinstance(shown, Failure) else shown,
            reward=None if reward is None else _finite(reward),
            done=bool(getattr(result, "done", False)),
        )


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"the session gave {number}, which is no finite number")
    return number


def _plain_schema(name: str) -> JsonSchema:
    """Return the schema of the tool that stands for plain actions."""
    parameters = {"type": "object", "properties": {"action": {"type": "string"}}, "required": ["action"]}
    function = {"name": name, "description": "Act in the environment.", "parameters": parameters}
    return {"type": "function", "function": function}
