"""Running tool calls: in parallel, with retries and time-outs, so that no tool can stop a rollout."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from atpo_fast.config.schema import ToolsConfig
from atpo_fast.data.questions import Passage
from atpo_fast.environment.python_tool import PythonTool
from atpo_fast.environment.search import BM25Search, HTTPSearch
from atpo_fast.environment.tags import ToolCall

T = TypeVar("T")

_BATCH = 64  # arguments given to one `run_many`
_CHARS_PER_TOKEN = 16  # far above what tokenizers reach on text: cutting here never shortens a result that would fit
_ERROR_CHARS = 200


class Tool(Protocol):
    """What the policy can call.

    `name` is also its tag. `run_many(arguments: list[str]) -> list[str]` may be offered too and is then used for the
    calls of one batch. An empty answer counts as a failure.
    """

    name: str

    def __call__(self, argument: str) -> str:
        """Answer one call."""
        ...


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The answer to one call; `ok` is False when `text` tells of a failure instead."""

    text: str
    ok: bool


class ToolBox:
    """The tools of an environment.

    Args:
        tools: tools by their `name`; a plain function `(str) -> str` is a tool too, by its `__name__`.
        retries: further tries after a call that raised, timed out or answered nothing.
        timeout_seconds: longest time of one try. A try that takes longer is abandoned; its thread is a daemon, so it
            cannot keep the interpreter alive.
        workers: calls run at once.
        max_chars: longer answers are cut to so many characters.

    Raises:
        ValueError: two tools with one name, or a name that cannot be a tag.
    """

    def __init__(
        self,
        tools: Sequence[Tool | Callable[[str], str]],
        *,
        retries: int = 3,
        timeout_seconds: float = 120.0,
        workers: int = 32,
        max_chars: int = 32_000,
    ) -> None:
        self.tools: dict[str, Callable[[str], str]] = {}
        for tool in tools:
            name = str(getattr(tool, "name", None) or getattr(tool, "__name__", ""))
            if not re.fullmatch(r"[A-Za-z_][\w-]*", name):
                raise ValueError(
                    f"tool {tool!r}: its name {name!r} cannot be a tag; give it a `name` of letters and digits"
                )
            if name in self.tools:
                raise ValueError(f"two tools are called {name!r}")
            self.tools[name] = tool
        self.tries = retries + 1
        self.timeout_seconds = timeout_seconds
        self.workers = workers
        self.max_chars = max_chars

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tools, in order."""
        return tuple(self.tools)

    def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Answer every call, in order; never raises for what a tool does. Identical calls run once."""
        results: dict[ToolCall, ToolResult] = {}
        arguments: dict[str, list[ToolCall]] = {}
        for call in dict.fromkeys(calls):
            if problem := self._problem(call):
                results[call] = ToolResult(problem, ok=False)
            else:
                arguments.setdefault(call.tool, []).append(call)
        jobs: list[Callable[[], None]] = []
        for name, asked in arguments.items():
            size = _BATCH if hasattr(self.tools[name], "run_many") else 1
            jobs += [partial(self._answer, name, asked[i : i + size], results) for i in range(0, len(asked), size)]
        _run_in_daemon_threads(jobs, self.workers)
        return [results[call] for call in calls]

    def _problem(self, call: ToolCall) -> str:
        """Why the call cannot be run; empty when it can."""
        if call.problem or call.tool in self.tools:
            return call.problem
        return f"Tool({call.tool}) does not exist. Tools: {', '.join(self.names) or 'none'}."

    def _answer(self, name: str, calls: list[ToolCall], results: dict[ToolCall, ToolResult]) -> None:
        """Fill `results` for calls of one tool: at first together if it can, then one by one what failed."""
        tool, tries = self.tools[name], self.tries
        run_many: Callable[[list[str]], list[str]] | None = getattr(tool, "run_many", None)
        answers: list[str] = [""] * len(calls)
        error = ""
        if run_many is not None:
            tries -= 1
            answers, error = self._try_many(run_many, [call.argument for call in calls])
        for call, answer in zip(calls, answers, strict=True):
            results[call] = self._success(answer) or self._try(name, tool, call.argument, tries, error)

    def _try_many(self, run_many: Callable[[list[str]], list[str]], arguments: list[str]) -> tuple[list[str], str]:
        """One batched try: (answers, error); after an error all answers are empty."""
        try:
            answers = [str(answer or "") for answer in _within(self.timeout_seconds, partial(run_many, arguments))]
            if len(answers) != len(arguments):
                raise ValueError(f"run_many answered {len(answers)} of {len(arguments)} calls")
        except Exception as exception:
            return [""] * len(arguments), _describe(exception)
        return answers, ""

    def _try(self, name: str, tool: Callable[[str], str], argument: str, tries: int, error: str) -> ToolResult:
        """Call until an answer comes; after `tries` failures say what failed last."""
        for _ in range(tries):
            try:
                result = self._success(_within(self.timeout_seconds, partial(tool, argument)))
                error = ""
            except Exception as exception:
                result, error = None, _describe(exception)
            if result is not None:
                return result
        reason = f"failed: {error}" if error else "returned empty output."
        return ToolResult(f"Tool({name}) {reason}", ok=False)

    def _success(self, answer: object) -> ToolResult | None:
        """The result that carries a tool's answer; None when it is empty."""
        text = str("" if answer is None else answer)
        return ToolResult(text[: self.max_chars], ok=True) if text.strip() else None


def make_toolbox(tools: ToolsConfig, passages: Sequence[Passage]) -> ToolBox:
    """The configured tools; `passages` are what the BM25 search searches.

    Raises:
        ValueError: a BM25 search without passages.
    """
    made: list[Tool] = []
    for name in tools.names:
        if name == "python":
            # Ends before the tool box gives up, so that slow code is answered once instead of tried again.
            made.append(PythonTool(timeout_seconds=0.9 * tools.timeout_seconds))
        elif tools.search_backend == "http":
            made.append(
                HTTPSearch(
                    tools.search_url,
                    top_k=tools.top_k,
                    passage_chars=tools.passage_chars,
                    timeout_seconds=tools.timeout_seconds,
                )
            )
        else:
            made.append(BM25Search(passages, top_k=tools.top_k, passage_chars=tools.passage_chars))
    return ToolBox(
        made,
        retries=tools.retries,
        timeout_seconds=tools.timeout_seconds,
        workers=tools.workers,
        max_chars=_CHARS_PER_TOKEN * tools.max_result_tokens,
    )


def _run_in_daemon_threads(jobs: Sequence[Callable[[], None]], workers: int) -> None:
    """Run all jobs, `workers` at a time. Daemon threads: the executors of the standard library block exit."""
    waiting = deque(jobs)

    def work() -> None:
        while waiting:
            try:
                job = waiting.popleft()
            except IndexError:  # another worker took the last job
                return
            job()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _within(seconds: float, function: Callable[[], T]) -> T:
    """The function's result. Raises TimeoutError when it takes longer (it goes on in a daemon thread)."""
    outcome: list[tuple[Any, BaseException | None]] = []

    def target() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as exception:  # a tool may also call sys.exit
            outcome.append((None, exception))

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    value, exception = outcome[0]
    if isinstance(exception, Exception):
        raise exception
    if exception is not None:
        raise RuntimeError(_describe(exception)) from exception
    return value


def _describe(exception: BaseException) -> str:
    """One short line."""
    return " ".join(f"{type(exception).__name__}: {exception}".split())[:_ERROR_CHARS]
