"""The tool box as a pool: limits, time-outs, retries, coroutines, and no leak whatever a tool does."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from itertools import pairwise
from typing import Any

import pytest

from atpo_fast.environment import ToolBox, ToolCall, ToolError
from atpo_fast.environment.tool_queue import MAX_ABANDONED, _Run


class Gate:
    """A tool that waits until it is let through; counts how many calls it holds at once."""

    name = "gate"

    def __init__(self) -> None:
        self.open = threading.Event()
        self.held = 0
        self.most_held = 0
        self._lock = threading.Lock()

    def __call__(self, argument: str) -> str:
        with self._lock:
            self.held += 1
            self.most_held = max(self.most_held, self.held)
        self.open.wait(300)
        with self._lock:
            self.held -= 1
        return argument


def echo(argument: str) -> str:
    return argument


def until(condition: Callable[[], bool]) -> None:
    for _ in range(30_000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("waited in vain")


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def memory_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


@pytest.fixture(scope="module", autouse=True)
def only_new_garbage() -> Iterator[None]:
    """Let collections look at what these tests leave, and not at all that the whole run has imported and holds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Fails any test that leaves a thread of the pool or of a tool behind."""
    before = set(threading.enumerate())
    yield
    if not set(threading.enumerate()) <= before:
        gc.collect()
    until(lambda: set(threading.enumerate()) <= before)


# ---- submitting


def test_answers_come_as_they_are_ready() -> None:
    """Fails if a slow call holds up a fast one."""
    gate = Gate()
    with ToolBox([gate, echo]) as toolbox:
        slow, fast = toolbox.submit(ToolCall("gate", "slow")), toolbox.submit(ToolCall("echo", "fast"))
        assert next(as_completed([slow, fast])).result().text == "fast"
        assert not slow.done()
        gate.open.set()
        assert slow.result().text == "slow"


def test_identical_calls_in_flight_run_once() -> None:
    """Fails if two branches that ask the same cost two calls, or a later call gets an old answer."""
    calls = []
    gate = threading.Event()

    def count(argument: str) -> str:
        calls.append(argument)
        gate.wait(300)
        return f"{argument} {len(calls)}"

    with ToolBox([count]) as toolbox:
        first, second = toolbox.submit(ToolCall("count", "x")), toolbox.submit(ToolCall("count", "x"))
        gate.set()
        assert first.result().text == second.result().text == "x 1"
        assert toolbox.submit(ToolCall("count", "x")).result().text == "x 2"


def test_bad_calls_are_answered_at_once() -> None:
    with ToolBox([echo]) as toolbox:
        assert toolbox.submit(ToolCall("no", "x")).result().text == "Tool(no) does not exist. Tools: echo."
        assert toolbox.submit(ToolCall("echo", "", "Why.")).result().text == "Why."


def test_futures_cannot_be_cancelled() -> None:
    """Fails if one of two askers can take the answer from the other."""
    gate = Gate()
    with ToolBox([gate]) as toolbox:
        future = toolbox.submit(ToolCall("gate", "x"))
        assert not future.cancel()
        gate.open.set()
        assert future.result().ok


# ---- limits


def test_each_tool_has_its_limit() -> None:
    """Fails if more calls run than the limit allows, fewer than it allows, or one tool's limit stops another."""
    gate = Gate()
    with ToolBox([gate, echo], workers=1, concurrency={"gate": 3}) as toolbox:
        calls = [ToolCall("gate", str(i)) for i in range(20)]
        futures = [toolbox.submit(call) for call in calls]
        until(lambda: gate.held >= 3)
        for text in "abcdefgh":
            assert toolbox.submit(ToolCall("echo", text)).result().text == text
        gate.open.set()
        assert [future.result().text for future in futures] == [call.argument for call in calls]
        assert gate.most_held == 3


def test_limits_for_tools_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="a limit is set for the tool 'serach'; tools: echo"):
        ToolBox([echo], concurrency={"serach": 4})
    with pytest.raises(ValueError, match="'pyhton'"):
        ToolBox([echo], timeouts={"pyhton": 4})


def test_time_outs_by_tool() -> None:
    gate = Gate()
    with ToolBox([gate], retries=0, timeouts={"gate": 0.05}) as toolbox:
        result = toolbox.run([ToolCall("gate", "x")])[0]
        assert result.text == "Tool(gate) failed: TimeoutError: no answer within 0.05 seconds"
        gate.open.set()


def test_a_call_that_waits_for_its_next_try_holds_no_slot() -> None:
    """Fails if back-off blocks the tool: with one slot, `b` comes between the tries of `a`."""
    order = []

    def once(argument: str) -> str:
        order.append(argument)
        if order == ["a"]:
            raise OSError
        return argument

    with ToolBox([once], workers=1, backoff_seconds=0.2) as toolbox:
        assert [r.text for r in toolbox.run([ToolCall("once", "a"), ToolCall("once", "b")])] == ["a", "b"]
    assert order == ["a", "b", "a"]


def test_tries_are_further_and_further_apart() -> None:
    """Fails if a tool that is down is asked again at once, or the wait does not double."""
    times: list[float] = []

    def down(argument: str) -> str:
        times.append(time.monotonic())
        raise OSError

    with ToolBox([down], retries=3, backoff_seconds=0.05) as toolbox:
        assert not toolbox.run([ToolCall("down", "x")])[0].ok
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert len(waits) == 3 and all(wait > 0.95 * due for wait, due in zip(waits, (0.05, 0.1, 0.2), strict=True))


def test_a_try_that_is_given_up_before_it_began_never_runs() -> None:
    """Fails if a try whose thread starts too late counts as one that never returned, for ever."""
    queue = ToolBox([echo])._queues["echo"]
    run = _Run()
    queue._give_up(run)
    assert queue._run_thread(["x"], run) == [] and queue.abandoned == 0


def test_a_final_failure_is_not_tried_again() -> None:
    calls = []

    def refuse(argument: str) -> str:
        calls.append(argument)
        raise ToolError("No, never.")

    with ToolBox([refuse], retries=3) as toolbox:
        result = toolbox.run([ToolCall("refuse", "x")])[0]
    assert (result.text, result.ok, calls) == ("No, never.", False, ["x"])


class Batched:
    """Batches; refuses one argument finally, and another for now."""

    name = "batched"

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def run_many(self, arguments: list[str]) -> list[str]:
        self.batches.append(arguments)
        if "never" in arguments:
            raise ToolError("Never.")
        return arguments

    def __call__(self, argument: str) -> str:
        return self.run_many([argument])[0]


def test_a_final_failure_in_a_batch_is_that_of_its_call() -> None:
    """Fails if a batch is answered as the one bad call in it."""
    tool = Batched()
    with ToolBox([tool]) as toolbox:
        results = toolbox.run([ToolCall("batched", argument) for argument in ("a", "never", "b")])
    assert [result.text for result in results] == ["a", "Never.", "b"]
    # The three run side by side, so their order is not promised.
    assert tool.batches[0] == ["a", "never", "b"] and sorted(tool.batches[1:]) == [["a"], ["b"], ["never"]]


def test_waiting_calls_become_a_batch() -> None:
    """Fails if single submissions to a busy tool are not put together."""
    started, gate, batches = threading.Event(), threading.Event(), []

    class Slow:
        name = "slow"

        def run_many(self, arguments: list[str]) -> list[str]:
            batches.append(len(arguments))
            return arguments

        def __call__(self, argument: str) -> str:
            started.set()
            gate.wait(300)
            return argument

    with ToolBox([Slow()], workers=1) as toolbox:
        first = toolbox.submit(ToolCall("slow", "first"))
        assert started.wait(300)
        futures = [toolbox.submit(ToolCall("slow", str(i))) for i in range(100)]
        gate.set()
        assert [future.result().text for future in futures] == [str(i) for i in range(100)] and first.result().ok
    assert batches == [64, 36]


# ---- coroutines


def test_coroutines_run_side_by_side_on_one_thread() -> None:
    """Fails if each takes a thread, or one waits for another to end (they meet: none could end alone)."""
    names, waiting = set(), 0
    everybody = asyncio.Event()

    async def meet(argument: str) -> str:
        nonlocal waiting
        names.add(threading.current_thread().name)
        waiting += 1
        if waiting == 200:
            everybody.set()
        await everybody.wait()
        return argument

    with ToolBox([meet], concurrency={"meet": 200}, timeout_seconds=300) as toolbox:
        assert all(result.ok for result in toolbox.run([ToolCall("meet", str(i)) for i in range(200)]))
    assert names == {"tool coroutines"}


def test_a_coroutine_that_takes_too_long_is_cancelled() -> None:
    cancelled = threading.Event()

    async def sleep(argument: str) -> str:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return argument

    with ToolBox([sleep], retries=0, timeout_seconds=0.05) as toolbox:
        assert "TimeoutError" in toolbox.run([ToolCall("sleep", "x")])[0].text
        assert cancelled.wait(300)
        until(lambda: toolbox._queues["sleep"].abandoned == 0)


def test_a_coroutine_that_blocks_its_loop_stops_no_other_tool() -> None:
    """Fails if the pool itself lives on the loop of the tools."""
    release = threading.Event()

    async def block(argument: str) -> str:
        release.wait(300)
        return argument

    with ToolBox([block, echo], retries=0, timeouts={"block": 0.1}) as toolbox:
        blocked, fine = toolbox.run([ToolCall("block", "x"), ToolCall("echo", "y")])
        assert "TimeoutError" in blocked.text and fine.text == "y"
        release.set()


def test_plain_functions_may_give_something_to_await() -> None:
    async def later(argument: str) -> str:
        await asyncio.sleep(0)
        return argument.upper()

    class Given:
        name = "given"

        def __call__(self, argument: str) -> Any:
            return later(argument)

    with ToolBox([Given()]) as toolbox:
        assert toolbox.run([ToolCall("given", "x")])[0].text == "X"


# ---- faults


class Nasty(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


def raising(error: BaseException) -> Callable[[], Any]:
    def throw() -> Any:
        raise error

    return throw


HUGE = 10_000_000


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda: None, "Tool(tool) returned empty output."),
        (lambda: " \n", "Tool(tool) returned empty output."),
        (lambda: "\0\x07", "Tool(tool) returned empty output."),  # nothing but control characters
        (lambda: b"", "Tool(tool) returned empty output."),
        (lambda: 42, "42"),
        (lambda: False, "False"),
        (lambda: {"a": [1, "é", None]}, '{"a":[1,"é",null]}'),
        (lambda: [1j], '["1j"]'),  # nothing that JSON knows
        (lambda: b"\xff\xfe a", "\ufffd\ufffd a"),
        (lambda: "a\0b\x1b[31mc\r\nd\re\tf\x85", "ab[31mc\nd\ne\tf"),
        (lambda: "a\ud800b", "a\ufffdb"),  # half of a pair, which no tokenizer takes
        (lambda: "x" * HUGE, "x" * 1000),
        (lambda: b"\xff" * HUGE, "\ufffd" * 1000),
        (lambda: " " * HUGE, "Tool(tool) returned empty output."),
        (lambda: ["x" * HUGE], '["' + "x" * 998),
        (raising(ValueError("a\n" * HUGE)), ("Tool(tool) failed: ValueError:" + " a" * 200)[: 200 + 19]),
        (raising(ToolError("a\0b" + "c" * HUGE)), "ab" + "c" * 1997),
        (raising(Nasty()), "Tool(tool) failed: Nasty"),
        (raising(SystemExit(3)), "Tool(tool) failed: RuntimeError: SystemExit: 3"),
        (raising(KeyboardInterrupt()), "Tool(tool) failed: RuntimeError: KeyboardInterrupt"),
        (raising(StopAsyncIteration()), "Tool(tool) failed: StopAsyncIteration"),
        (raising(asyncio.CancelledError()), "Tool(tool) failed: RuntimeError: CancelledError"),
        (raising(GeneratorExit()), "Tool(tool) failed: RuntimeError: GeneratorExit"),
        (lambda: os.read(-1, 1), "Tool(tool) failed: OSError: [Errno 9] Bad file descriptor"),
        (lambda: sys.exit("bye"), "Tool(tool) failed: RuntimeError: SystemExit: bye"),
    ],
)
@pytest.mark.parametrize("coroutine", [False, True])
def test_whatever_a_tool_does_is_answered(act: Callable[[], Any], text: str, coroutine: bool) -> None:
    """Fails if an odd answer or exception is lost, stops the pool, or reaches the tokenizer as it is."""

    def tool(argument: str) -> Any:
        return act()

    async def later(argument: str) -> Any:
        return act()

    later.__name__ = "tool"
    with ToolBox([later if coroutine else tool, echo], retries=1, max_chars=1000, backoff_seconds=0) as toolbox:
        result = toolbox.run([ToolCall("tool", "x")])[0]
        assert result.text == text
        assert result.ok == (not text.startswith(("Tool(tool)", "abc")))
        assert toolbox.run([ToolCall("echo", "y")])[0].text == "y"


def test_hanging_threads_are_bounded() -> None:
    """Fails if every hanging call leaves one more thread, or the tool stays unavailable when they return."""
    gate, before = Gate(), threading.active_count()
    with ToolBox([gate, echo], retries=0, timeouts={"gate": 0.02}, workers=8) as toolbox:
        results = toolbox.run([ToolCall("gate", str(i)) for i in range(300)])
        # One more than the bound, at most as many as were running when it was passed, and the pool.
        assert threading.active_count() <= before + MAX_ABANDONED + 1 + 8 + 1
        assert all(not result.ok for result in results)
        assert "TimeoutError" in results[0].text
        assert results[-1].text.startswith("Tool(gate) is unavailable: ")
        assert results[-1].text.endswith(" of its calls never returned.")
        assert toolbox.run([ToolCall("echo", "y")])[0].text == "y"
        gate.open.set()
        toolbox._queues["gate"]._timeout_seconds = 120.0  # what does not hang may take its time
        until(lambda: toolbox.run([ToolCall("gate", "again")])[0].ok)


def test_a_thousand_calls_leave_nothing() -> None:
    """Fails if answers, failures, time-outs or coroutines cost a thread, a handle or memory each."""

    def odd(argument: str) -> Any:
        kind = int(argument) % 5
        if kind == 0:
            raise ValueError(argument)
        if kind == 1:
            sys.exit(1)
        if kind == 2:
            time.sleep(0.02)  # longer than it may take
        return [None, None, "late", b"\xff" * 100_000, "x" * 1_000_000][kind]

    async def slow(argument: str) -> str:
        await asyncio.sleep(600 if argument.endswith("7") else 0)
        return argument

    timeouts = {"odd": 0.01, "slow": 0.01}
    # The two loops, a worker thread for each call that runs at once, and for each that was abandoned and still sleeps.
    most_threads = threading.active_count() + 2 + 2 * 32 + (MAX_ABANDONED + 32)
    with ToolBox([odd, slow, echo], retries=1, backoff_seconds=0.001, timeouts=timeouts, max_chars=1000) as toolbox:

        def round_of(first: int) -> None:
            names = ("odd", "slow", "echo")
            results = toolbox.run([ToolCall(names[i % 3], str(i)) for i in range(first, first + 250)])
            assert len(results) == 250 and any(r.ok for r in results) and any(not r.ok for r in results)
            until(lambda: not any(queue.abandoned for queue in toolbox._queues.values()))

        round_of(0)
        gc.collect()
        before = handles(), memory_mb()
        for first in (250, 500, 750):
            round_of(first)
        gc.collect()
        until(lambda: handles() == before[0])
        assert threading.active_count() <= most_threads and memory_mb() < before[1] + 8
        assert not toolbox._in_flight and not toolbox._tasks


# ---- the end


def test_closing_answers_what_is_in_flight() -> None:
    """Fails if somebody waits for ever for a call of a closed tool box."""
    gate = Gate()
    toolbox = ToolBox([gate], workers=1)
    futures = [toolbox.submit(ToolCall("gate", str(i))) for i in range(3)]
    until(lambda: gate.held == 1)
    toolbox.close()
    assert {future.result().text for future in futures} == {"Tool(gate) failed: the tool box was closed"}
    with pytest.raises(RuntimeError, match="was closed"):
        toolbox.submit(ToolCall("gate", "x"))
    gate.open.set()


def test_tools_are_closed() -> None:
    class Closed:
        name = "closed"
        closed = False

        def __call__(self, argument: str) -> str:
            return argument

        def close(self) -> None:
            self.closed = True

    tool = Closed()
    ToolBox([tool]).close()
    assert tool.closed


def test_a_forgotten_tool_box_ends_its_thread() -> None:
    """Fails (in `no_thread_left`) if the thread of the pool keeps the tool box alive."""
    before = handles()
    for _ in range(20):
        assert ToolBox([echo]).run([ToolCall("echo", "x")])[0].ok
    gc.collect()
    until(lambda: handles() <= before)
