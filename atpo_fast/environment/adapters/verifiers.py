"""Tasks of verifiers' v1 interface (`pip install "verifiers>=0.4"`).

A session goes without verifiers' harness: the task's `setup`, its tools, its stop conditions and its scoring are called
directly, the tools in this process. There is no snapshot of a runtime, so that a session is replayed. An `Env` with a
`run` of its own, such as one with a simulated user, owns the loop: import its traces instead.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn

from atpo_fast.environment.adapters.common import as_text, column, package
from atpo_fast.environment.adapters.verifiers_parts import empty_trace, nodes, open_tools, tool_schemas
from atpo_fast.environment.session import Message, Result, Session


class VerifiersSession(Session):
    """A session over one rollout of a task, which `begin` sets up."""

    def __init__(self, task: Any, trace: Any, runtime: Any, tools: dict[str, Callable[..., Any]]):
        self._task, self._trace, self._runtime, self._functions = task, trace, runtime, tools
        self._prompt = task.data.prompt_text
        self.opening = self._prompt or None
        self.tools = tool_schemas(tools)
        self._calls: list[tuple[Any, str]] = []

    @classmethod
    async def begin(cls, task: Any) -> VerifiersSession:
        """Set up a task and its tools, with a subprocess runtime of its own."""
        package("verifiers", "'verifiers>=0.4'", "verifiers.v1")
        trace, runtime = empty_trace(task)
        await runtime.start()
        try:
            await task.setup(trace, runtime)
            return cls(task, trace, runtime, await open_tools(task, trace.state))
        except BaseException:
            await runtime.stop()
            raise

    async def call(self, name: str, arguments: dict[str, Any]) -> Result:  # type: ignore[override]  # may be async
        """Call a tool. The episode is done where a stop condition on the trace holds."""
        from pydantic import validate_call
        from verifiers.v1 import ToolCall, Trace
        from verifiers.v1.session import call_hook, hook_boundary

        answer = validate_call(self._functions[name])(**arguments)
        text = as_text(await answer if inspect.isawaitable(answer) else answer)
        call = ToolCall(id=f"call_{len(self._calls)}", name=name, arguments=json.dumps(arguments))
        self._calls.append((call, text))
        self._trace.nodes = nodes(self._prompt, self._calls)
        stops = [hook for hook in self._task.hooks("stop") if hook_boundary(hook, allow_trace=True) is Trace]
        return Result(text, done=any([await call_hook(stop, {Trace: self._trace}) for stop in stops]))

    async def score(self, transcript: list[Message]) -> float:  # type: ignore[override]
        """Finish the task, and add up its weighted rewards."""
        written = [part["content"] for part in transcript if part["role"] == "assistant"]
        self._trace.nodes = nodes(self._prompt, self._calls, written)
        self._trace.stop("agent_completed")
        await self._task.finalize(self._trace, self._runtime)
        await self._task.score(self._trace, self._runtime)
        return float(self._trace.reward)

    async def close(self) -> None:  # type: ignore[override]
        """Stop the runtime."""
        await self._runtime.stop()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("a runtime of verifiers cannot be copied")


def sessions_of(tasks: Sequence[Any]) -> Callable[[dict[str, Any], int], Awaitable[VerifiersSession]]:
    """Make an `open_session` from the tasks of a taskset; the record's column `task` is the number of its task."""

    async def open_session(task: dict[str, Any], seed: int) -> VerifiersSession:
        return await VerifiersSession.begin(tasks[column(task, "task")])

    return open_session
