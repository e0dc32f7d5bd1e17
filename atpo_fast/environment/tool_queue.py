"""The calls of one tool: how many run at once, which become a batch, and how long a try may take."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread

from atpo_fast.common.event_loop import LazyEventLoop
from atpo_fast.environment.answers import Failure, Outcome, answer_text, failure_of
from atpo_fast.environment.function_tool import is_async

MAX_ABANDONED = 32  # calls of one tool that never returned; with more the tool is not called any more
_BATCH = 64  # arguments given to one `run_many`


@dataclass(frozen=True, slots=True)
class Attempt:
    """The outcome of one try of a call; a failure in a batch may be that of another call."""

    outcome: Outcome
    batched: bool

    @property
    def is_final(self) -> bool:
        """Whether no further try would give anything else."""
        return isinstance(self.outcome, str) or (self.outcome.final and not self.batched)


@dataclass(slots=True, eq=False)
class _Waiting:
    """A call that waits for its try, and then for the outcome."""

    argument: str
    unbatched: bool
    attempt: asyncio.Future[Attempt]
    taken: bool = False


@dataclass(slots=True, eq=False)
class _Run:
    """A try on a thread or as a coroutine, which may continue after it was abandoned."""

    running: bool = False
    timed_out: bool = False


class ToolQueue:
    """A queue that runs the calls of one tool in the order in which they come.

    `attempt` belongs to the event loop of the tool box. The tool itself runs on anyio's worker threads, or as a
    coroutine on the loop `coroutines`, which a tool may block.

    Args:
        tool: called with one argument; its `run_many`, if any, with the arguments of calls that wait together.
        limit: number of tries that run at once.
        timeout_seconds: longest time of a try; then it is abandoned. A coroutine is cancelled, a thread runs on.
        max_chars: number of characters to which an answer is cut.
        coroutines: the event loop that coroutines of tools run on.
    """

    def __init__(
        self,
        tool: Callable[[str], Any],
        *,
        limit: int,
        timeout_seconds: float,
        max_chars: int,
        coroutines: LazyEventLoop,
    ) -> None:
        self.abandoned = 0  # number of abandoned tries that still run
        self._tool = tool
        self._timeout_seconds = timeout_seconds
        self._max_chars = max_chars
        self._coroutines = coroutines
        self._waiting: deque[_Waiting] = deque()
        self._limiter = anyio.CapacityLimiter(limit)
        self._threads = anyio.CapacityLimiter(math.inf)  # the one above is what bounds them
        self._lock = threading.Lock()  # of `abandoned` and of every _Run

    async def attempt(self, argument: str, *, unbatched: bool) -> Attempt:
        """Try a call once, in a batch with others that wait unless it is `unbatched`."""
        unbatched = unbatched or not hasattr(self._tool, "run_many")
        mine = _Waiting(argument, unbatched, asyncio.get_running_loop().create_future())
        self._waiting.append(mine)
        async with self._limiter:
            if not mine.taken:  # else an earlier call has it in its batch
                batch = self._take(mine)
                outcomes = await self._outcomes([waiting.argument for waiting in batch])
                for waiting, outcome in zip(batch, outcomes, strict=True):
                    waiting.attempt.set_result(Attempt(outcome, batched=len(batch) > 1))
        return await mine.attempt

    def _take(self, first: _Waiting) -> list[_Waiting]:
        """Take a call and those that become a batch with it out of the queue."""
        self._waiting.remove(first)
        batch = [first]
        while not first.unbatched and self._waiting and not self._waiting[0].unbatched and len(batch) < _BATCH:
            batch.append(self._waiting.popleft())
        for waiting in batch:
            waiting.taken = True
        return batch

    async def _outcomes(self, arguments: list[str]) -> list[Outcome]:
        """Run the tool outside of this thread, for as long as it may take."""
        if self.abandoned > MAX_ABANDONED:
            text = f"Tool({self._tool.name}) is unavailable: {self.abandoned} of its calls never returned."  # type: ignore[attr-defined]
            return [Failure(text, final=True)] * len(arguments)
        run = _Run()
        try:
            with anyio.fail_after(self._timeout_seconds):
                if is_async(self._tool) and len(arguments) == 1:
                    return await asyncio.wrap_future(self._coroutines.submit(self._run_coroutine(arguments[0], run)))
                return await anyio.to_thread.run_sync(
                    self._run_thread, arguments, run, abandon_on_cancel=True, limiter=self._threads
                )
        except TimeoutError:
            self._give_up(run)
            return [failure_of(TimeoutError(f"no answer within {self._timeout_seconds:g} seconds"))] * len(arguments)
        except Exception as error:  # no thread could be started
            return [failure_of(error)] * len(arguments)

    # --- on a worker thread, or on the loop of the coroutines

    def _run_thread(self, arguments: list[str], run: _Run) -> list[Outcome]:
        """Answer one call or a batch; whatever the tool raises becomes a failure."""
        if not self._begin(run):
            return []
        try:
            if len(arguments) > 1:
                answers = list(self._tool.run_many(arguments))  # type: ignore[attr-defined]
                if len(answers) != len(arguments):
                    raise ValueError(f"run_many answered {len(answers)} of {len(arguments)} calls")
            else:
                answers = [self._tool(arguments[0])]
            answers = [self._wait_for(answer) if inspect.isawaitable(answer) else answer for answer in answers]
            return [answer_text(answer, self._max_chars) for answer in answers]
        except BaseException as error:  # a tool may also call sys.exit
            return [failure_of(error)] * len(arguments)
        finally:
            self._end(run)

    async def _run_coroutine(self, argument: str, run: _Run) -> list[Outcome]:
        """Answer one call; a cancelled coroutine counts as running until it has really ended."""
        if not self._begin(run):
            return []
        try:
            return [answer_text(await self._tool(argument), self._max_chars)]
        except BaseException as error:
            return [failure_of(error)]
        finally:
            self._end(run)

    def _wait_for(self, awaitable: Awaitable[Any]) -> Any:
        """Wait on a thread for what a plain call gave to be awaited."""

        async def wait() -> Any:
            return await awaitable

        return self._coroutines.submit(wait()).result()

    def _begin(self, run: _Run) -> bool:
        with self._lock:
            run.running = not run.timed_out
            return run.running

    def _give_up(self, run: _Run) -> None:
        with self._lock:
            run.timed_out = True
            self.abandoned += run.running

    def _end(self, run: _Run) -> None:
        with self._lock:
            run.running = False
            self.abandoned -= run.timed_out
