"""Running tool calls side by side, with limits, time-outs and retries, so that no tool can stop a rollout."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from atpo_fast.common.event_loop import EventLoopThread
from atpo_fast.environment.answers import Failure, Outcome, answer_text, failure_of
from atpo_fast.environment.function_tool import as_tool, is_async
from atpo_fast.environment.tags import TAGS, ToolCall

MAX_ABANDONED = 32  # calls of one tool that never returned; with more the tool is not called any more
_BATCH = 64  # arguments given to one `run_many`
_MAX_BACKOFF_SECONDS = 30.0


class Tool(Protocol):
    """What the policy can call.

    `name` is also its tag. May be offered too: `run_many(arguments: list[str]) -> list[str]`, then used for calls that
    wait together; `description` and `parameters` (a JSON schema) for the prompt; `close()`. An empty answer counts as a
    failure, and so does an exception; ToolError is a failure that is not tried again. `__call__` may be `async`.
    """

    name: str

    def __call__(self, argument: str) -> Any:
        """Answer one call."""
        ...


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The answer to one call; `ok` is False when `text` tells of a failure instead."""

    text: str
    ok: bool


@dataclass(slots=True, eq=False)
class _Job:
    """A call that is not answered yet."""

    call: ToolCall
    future: Future[ToolResult]
    failures: int = 0
    alone: bool = False  # not in a batch again: one of the last batch failed


@dataclass(slots=True, eq=False)
class _Lane:
    """One tool with its waiting and running calls; changed on the thread of the event loop only."""

    name: str
    tool: Callable[[str], Any]
    limit: int
    timeout_seconds: float
    max_chars: int
    waiting: deque[_Job] = field(default_factory=deque)
    running: int = 0
    abandoned: int = 0

    def take(self) -> list[_Job]:
        """The calls of the next try."""
        jobs = [self.waiting.popleft()]
        if hasattr(self.tool, "run_many") and not jobs[0].alone:
            while self.waiting and not self.waiting[0].alone and len(jobs) < _BATCH:
                jobs.append(self.waiting.popleft())
        return jobs


class ToolBox:
    """The tools of an environment, and the pool that runs their calls.

    Args:
        tools: tools by their `name`; a plain function is a tool too, by its `__name__` (see FunctionTool).
        retries: further tries after a call that raised, timed out or answered nothing.
        timeout_seconds: longest time of one try. A try that takes longer is abandoned: a coroutine is cancelled, a
            thread is left to itself (it is a daemon). A tool with more than MAX_ABANDONED threads left is answered
            "unavailable" until some of them return.
        workers: tries of one tool that run at once.
        max_chars: longer answers are cut to so many characters.
        backoff_seconds: wait before the second try; twice as long before each further one.
        concurrency: by tool, instead of `workers`.
        timeouts: by tool, instead of `timeout_seconds`.

    Raises:
        ValueError: two tools with one name, a name that cannot be a tag, a function that cannot be a tool, or a limit
            for a tool that does not exist.
    """

    def __init__(
        self,
        tools: Sequence[Tool | Callable[..., Any]],
        *,
        retries: int = 3,
        timeout_seconds: float = 120.0,
        workers: int = 32,
        max_chars: int = 32_000,
        backoff_seconds: float = 0.05,
        concurrency: Mapping[str, int] | None = None,
        timeouts: Mapping[str, float] | None = None,
    ) -> None:
        self.tools: dict[str, Callable[[str], Any]] = {}
        self._lanes: dict[str, _Lane] = {}
        self.tries = retries + 1
        self.backoff_seconds = backoff_seconds
        concurrency, timeouts = concurrency or {}, timeouts or {}
        for tool in map(as_tool, tools):
            name = str(tool.name)  # type: ignore[attr-defined]
            self._check_name(name, tool)
            self.tools[name] = tool
            limit, seconds = concurrency.get(name, workers), timeouts.get(name, timeout_seconds)
            self._lanes[name] = _Lane(name, tool, limit, seconds, max_chars)
        for name in (*concurrency, *timeouts):
            if name not in self.tools:
                raise ValueError(f"a limit is set for the tool {name!r}; tools: {', '.join(self.names) or 'none'}")
        self._lock = threading.Lock()  # of the following three
        self._in_flight: dict[ToolCall, Future[ToolResult]] = {}
        self._pool: EventLoopThread | None = None
        self._closed = False
        self._coroutines: EventLoopThread | None = None  # apart from the pool, which a tool must not block
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> ToolBox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tools, in order."""
        return tuple(self.tools)

    def schemas(self) -> list[dict[str, Any]]:
        """The tools in OpenAI's form, for prompts: `{"type": "function", "function": {name, description, ...}}`."""
        return [_schema(name, tool) for name, tool in self.tools.items()]

    def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Answer every call, in order; never raises for what a tool does. Identical calls run once."""
        return [future.result() for future in self._submit(calls)]

    def submit(self, call: ToolCall) -> Future[ToolResult]:
        """Answer a call in the background. The future never fails and cannot be cancelled.

        Identical calls in flight run once and share their future. Callbacks of the future run on the pool's thread and
        have to be short.

        Raises:
            RuntimeError: the tool box was closed.
        """
        return self._submit([call])[0]

    def close(self) -> None:
        """Answer what is in flight as failed, end the pool, and close tools that can be closed."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        for thread in (pool, self._coroutines):
            if thread is not None:
                thread.close()
        with self._lock:
            left, self._in_flight = self._in_flight, {}
        for call, future in left.items():
            future.set_result(ToolResult(f"Tool({call.tool}) failed: the tool box was closed", ok=False))
        for tool in self.tools.values():
            if hasattr(tool, "close"):
                tool.close()

    # --- on the threads of the callers

    def _check_name(self, name: str, tool: Any) -> None:
        if not re.fullmatch(r"[A-Za-z_][\w-]*", name):
            raise ValueError(
                f"tool {tool!r}: its name {name!r} cannot be a tag; give it a `name` of letters and digits"
            )
        if name in (TAGS.think, TAGS.answer, TAGS.result):
            raise ValueError(f"tool {tool!r}: <{name}> has a meaning of its own; give it another `name`")
        if name in self.tools:
            raise ValueError(f"two tools are called {name!r}")

    def _submit(self, calls: Sequence[ToolCall]) -> list[Future[ToolResult]]:
        """Futures of calls; those that are new wait together, so that a batch can be made of them."""
        futures, jobs = [], []
        with self._lock:
            if self._closed:
                raise RuntimeError("the tool box was closed")
            for call in calls:
                future = self._in_flight.get(call)
                if future is None:
                    future = Future[ToolResult]()
                    future.set_running_or_notify_cancel()
                    if problem := self._problem(call):
                        future.set_result(ToolResult(problem, ok=False))
                    else:
                        self._in_flight[call] = future
                        jobs.append(_Job(call, future))
                futures.append(future)
            if jobs:
                self._pool = self._pool or EventLoopThread("tool box")
                self._pool.loop.call_soon_threadsafe(self._enqueue, jobs)
        return futures

    def _problem(self, call: ToolCall) -> str:
        """Why the call cannot be run; empty when it can."""
        if call.problem or call.tool in self.tools:
            return call.problem
        return f"Tool({call.tool}) does not exist. Tools: {', '.join(self.names) or 'none'}."

    # --- on the thread of the pool

    def _enqueue(self, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            self._lanes[job.call.tool].waiting.append(job)
        for name in dict.fromkeys(job.call.tool for job in jobs):  # later, so that calls that came since join a batch
            asyncio.get_running_loop().call_soon(self._start, self._lanes[name])

    def _start(self, lane: _Lane) -> None:
        """Begin as many tries of a tool as its limit allows."""
        while lane.waiting and lane.running < lane.limit:
            lane.running += 1
            task = asyncio.get_running_loop().create_task(self._try(lane, lane.take()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _try(self, lane: _Lane, jobs: list[_Job]) -> None:
        """One try for one call or for a batch."""
        outcomes: list[Outcome]
        if lane.abandoned > MAX_ABANDONED:
            text = f"Tool({lane.name}) is unavailable: {lane.abandoned} of its calls never returned."
            outcomes = [Failure(text, final=True)] * len(jobs)
        else:
            try:
                outcomes = await self._outcomes(lane, [job.call.argument for job in jobs])
            except Exception as error:  # no thread could be started
                outcomes = [failure_of(error)] * len(jobs)
        lane.running -= 1
        for job, outcome in zip(jobs, outcomes, strict=True):
            self._settle(job, outcome, batched=len(jobs) > 1)
        self._start(lane)

    async def _outcomes(self, lane: _Lane, arguments: list[str]) -> list[Outcome]:
        """Run a tool outside of this thread, for as long as it may take."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[list[Outcome]] = loop.create_future()

        def deliver(outcomes: list[Outcome]) -> None:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                loop.call_soon_threadsafe(ended.set_result, outcomes)

        cancel: Callable[[], Any]
        if is_async(lane.tool) and len(arguments) == 1:
            cancel = self._run_coroutine(_await_one(lane, arguments[0], deliver))
        else:
            cancel = bool  # a thread cannot be ended
            work = partial(_call, lane, arguments, self._wait_for, deliver)
            threading.Thread(target=work, name=f"tool {lane.name}", daemon=True).start()
        await asyncio.wait([ended], timeout=lane.timeout_seconds)
        if ended.done():
            return ended.result()
        cancel()
        lane.abandoned += 1
        ended.add_done_callback(lambda _: setattr(lane, "abandoned", lane.abandoned - 1))
        error = TimeoutError(f"no answer within {lane.timeout_seconds:g} seconds")
        return [failure_of(error)] * len(arguments)

    def _settle(self, job: _Job, outcome: Outcome, batched: bool) -> None:
        """Answer a call or let it be tried again."""
        if isinstance(outcome, str):
            self._finish(job, ToolResult(outcome, ok=True))
            return
        job.failures += 1
        job.alone = True
        if job.failures >= self.tries or (outcome.final and not batched):
            text = outcome.text if outcome.final else f"Tool({job.call.tool}) {outcome.text}"
            self._finish(job, ToolResult(text, ok=False))
        else:
            delay = min(_MAX_BACKOFF_SECONDS, self.backoff_seconds * 2 ** (job.failures - 1))
            asyncio.get_running_loop().call_later(delay, self._enqueue, [job])

    def _finish(self, job: _Job, result: ToolResult) -> None:
        with self._lock:
            mine = self._in_flight.pop(job.call, None)
        if mine is not None:  # else `close` has answered it
            job.future.set_result(result)

    # --- coroutines of tools

    def _run_coroutine(self, coroutine: Any) -> Callable[[], Any]:
        """Start a coroutine on the tools' own loop; what cancels it."""
        return self._coroutine_loop().submit(coroutine).cancel

    def _wait_for(self, awaitable: Awaitable[Any]) -> Any:
        """The outcome of what a plain call gave to be awaited; called on the try's thread."""

        async def wait() -> Any:
            return await awaitable

        return self._coroutine_loop().submit(wait()).result()

    def _coroutine_loop(self) -> EventLoopThread:
        with self._lock:
            self._coroutines = self._coroutines or EventLoopThread("tool coroutines")
            return self._coroutines


def _call(
    lane: _Lane,
    arguments: list[str],
    wait_for: Callable[[Awaitable[Any]], Any],
    deliver: Callable[[list[Outcome]], None],
) -> None:
    """One try on a thread of its own: whatever the tool does, outcomes are delivered when it has done it."""
    outcomes: list[Outcome]
    try:
        if len(arguments) > 1:
            answers = list(lane.tool.run_many(arguments))  # type: ignore[attr-defined]
            if len(answers) != len(arguments):
                raise ValueError(f"run_many answered {len(answers)} of {len(arguments)} calls")
        else:
            answers = [lane.tool(arguments[0])]
        answers = [wait_for(answer) if inspect.isawaitable(answer) else answer for answer in answers]
        outcomes = [answer_text(answer, lane.max_chars) for answer in answers]
    except BaseException as error:  # a tool may also call sys.exit
        outcomes = [failure_of(error)] * len(arguments)
    deliver(outcomes)


async def _await_one(lane: _Lane, argument: str, deliver: Callable[[list[Outcome]], None]) -> None:
    """One try as a coroutine; delivers when it has really ended, cancelled or not."""
    outcome: Outcome
    try:
        outcome = answer_text(await lane.tool(argument), lane.max_chars)
    except BaseException as error:
        outcome = failure_of(error)
    deliver([outcome])


def _schema(name: str, tool: Callable[[str], Any]) -> dict[str, Any]:
    """A tool in OpenAI's form; without a schema of its own it takes one text."""
    description = getattr(tool, "description", None) or (inspect.getdoc(type(tool)) or "").partition("\n\n")[0]
    text = {"type": "object", "properties": {"argument": {"type": "string"}}, "required": ["argument"]}
    parameters = getattr(tool, "parameters", None) or text
    return {
        "type": "function",
        "function": {"name": name, "description": " ".join(description.split()), "parameters": parameters},
    }
