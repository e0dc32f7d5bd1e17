"""The tool box: run tool calls side by side, with limits, time-outs and retries, so that no tool can stop a rollout.

A call is a task on the event loop of the pool, a thread of its own. It waits for its turn in the queue of its tool
(`ToolQueue`) and is tried there; tenacity decides whether and when it is tried again.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from tenacity import AsyncRetrying, RetryCallState, retry_if_result, stop_after_attempt, wait_exponential

from atpo_fast.common.event_loop import EventLoopThread, LazyEventLoop
from atpo_fast.environment.answers import Outcome
from atpo_fast.environment.descriptions import tool_schema
from atpo_fast.environment.function_tool import as_tool
from atpo_fast.environment.tags import TAGS, ToolCall
from atpo_fast.environment.tool_queue import Attempt, ToolQueue
from atpo_fast.environment.tool_watch import ToolCounts

_MAX_BACKOFF_SECONDS = 30.0


class Tool(Protocol):
    """A tool that the policy can call.

    `name` is also its tag. May be offered too: `run_many(arguments: list[str]) -> list[str]`, then used for calls that
    wait together; `description` and `parameters` (a JSON schema) for the prompt; `close()`. An empty answer counts as a
    failure, and so does an exception; ToolError is a failure that is not tried again. `__call__` may be `async`.
    """

    name: str

    def __call__(self, argument: str) -> Any:
        """Answer one call with the given argument."""
        ...


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The answer to one call; `ok` is False when `text` describes a failure instead."""

    text: str
    ok: bool


class ToolBox:
    """The tools of an environment, with a queue for the calls of each.

    Args:
        tools: tools by their `name`; a plain function is a tool too, by its `__name__` (see FunctionTool).
        retries: number of further tries after a call that raised, timed out or answered nothing.
        timeout_seconds: longest time of one try. A try that takes longer is abandoned: a coroutine is cancelled, a
            thread runs on (it is a daemon and does not keep the interpreter from ending). A tool with more than
            MAX_ABANDONED of these is answered "unavailable" until some of them return.
        workers: number of tries of one tool that run at once.
        max_chars: number of characters to which an answer is cut.
        backoff_seconds: wait before the second try; twice as long before each further one.
        concurrency: by tool, instead of `workers`.
        timeouts: by tool, instead of `timeout_seconds`.

    Attributes:
        counts: by tool, what became of its calls.
        last_failures: by tool, the text of the last failure.

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
        self._queues: dict[str, ToolQueue] = {}
        self._coroutines = LazyEventLoop("tool coroutines")  # apart from the pool, which a tool must not block
        self._retrying = AsyncRetrying(
            retry=retry_if_result(_may_be_retried),
            stop=stop_after_attempt(retries + 1),
            wait=wait_exponential(multiplier=backoff_seconds, max=_MAX_BACKOFF_SECONDS),
            retry_error_callback=_last_attempt,
        )
        concurrency, timeouts = concurrency or {}, timeouts or {}
        for tool in map(as_tool, tools):
            name = str(tool.name)  # type: ignore[attr-defined]
            self._check_name(name, tool)
            self.tools[name] = tool
            self._queues[name] = ToolQueue(
                tool,
                limit=concurrency.get(name, workers),
                timeout_seconds=timeouts.get(name, timeout_seconds),
                max_chars=max_chars,
                coroutines=self._coroutines,
            )
        for name in (*concurrency, *timeouts):
            if name not in self.tools:
                raise ValueError(f"a limit is set for the tool {name!r}; tools: {', '.join(self.names) or 'none'}")
        self.counts = {name: ToolCounts() for name in self.tools}
        self.last_failures: dict[str, str] = {}
        self._lock = threading.Lock()  # of the following three
        self._in_flight: dict[ToolCall, Future[ToolResult]] = {}
        self._pool: EventLoopThread | None = None
        self._closed = False
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
        """Return the tools in OpenAI's form: `{"type": "function", "function": {name, description, parameters}}`."""
        return [tool_schema(tool) for tool in self.tools.values()]

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
        if pool is not None:
            pool.close()
        self._coroutines.close()
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
        """Return the futures of calls. Calls that are new start together, so that they can form a batch."""
        futures, new = [], []
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
                        new.append(call)
                futures.append(future)
            if new:
                self._pool = self._pool or EventLoopThread("tool box")
                self._pool.loop.call_soon_threadsafe(self._start, new)
        return futures

    def _problem(self, call: ToolCall) -> str:
        """Return why a call cannot be run; an empty text when it can."""
        if call.problem or call.tool in self.tools:
            return call.problem
        return f"Tool({call.tool}) does not exist. Tools: {', '.join(self.names) or 'none'}."

    # --- on the thread of the pool

    def _start(self, calls: Sequence[ToolCall]) -> None:
        """Begin to answer calls; the tasks are kept, because the loop itself would let them be collected."""
        for call in calls:
            task = asyncio.get_running_loop().create_task(self._answer(call))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, call: ToolCall) -> None:
        """Try a call until it is answered or no try is left."""
        queue = self._queues[call.tool]
        attempt = await queue.attempt(call.argument, unbatched=False)
        if not attempt.is_final:  # most calls end here: tenacity would double what a batched search costs
            async for retry in self._retrying.copy():  # a copy: one object serves one call at a time
                if retry.retry_state.attempt_number > 1:
                    attempt = await queue.attempt(call.argument, unbatched=True)
                retry.retry_state.set_result(attempt)
        self._finish(call, attempt.outcome)

    def _finish(self, call: ToolCall, outcome: Outcome) -> None:
        """Give a call's outcome to everybody who asked for it."""
        self.counts[call.tool].add(outcome)
        if isinstance(outcome, str):
            result = ToolResult(outcome, ok=True)
        else:
            result = ToolResult(outcome.text if outcome.final else f"Tool({call.tool}) {outcome.text}", ok=False)
            if outcome.kind != "refused":
                self.last_failures[call.tool] = result.text
        with self._lock:
            future = self._in_flight.pop(call, None)
        if future is not None:  # else `close` has answered it
            future.set_result(result)


def _may_be_retried(attempt: Attempt) -> bool:
    """Return whether another try may give something else."""
    return not attempt.is_final


def _last_attempt(state: RetryCallState) -> Any:
    """Return what the last try gave, where tenacity would raise an error of its own."""
    assert state.outcome is not None
    return state.outcome.result()
