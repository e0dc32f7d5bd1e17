"""The streaming schedule against the synchronous one, which defines the trees, and what it promises beside them."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_fast.engines.base import Completion, Request, TurnKey
from atpo_fast.environment import ToolBox, ToolCall, ToolResult, format_result
from atpo_fast.rollout import TreeSearch, growth, in_order
from atpo_fast.rollout.cache_budget import CacheBudget
from atpo_fast.tree import TurnTree
from tests.helpers.scripted_engine import (
    ANSWER,
    ScriptedEngine,
    Search,
    as_data,
    by_seed,
    encode,
    make_search,
    prompts,
    questions,
    search_then_answer,
)

PATIENCE = 120.0  # seconds until a test that waits for what never happens fails; less than the tool box's time-out


class RandomSearch(Search):
    """Answers after a random while."""

    def __init__(self, seed: int, longest: float = 0.003) -> None:
        super().__init__()
        self.rng, self.longest = np.random.default_rng(seed), longest

    def __call__(self, argument: str) -> str:
        time.sleep(self.rng.random() * self.longest)
        return super().__call__(argument)


def random_polls(seed: int) -> Callable[[Request], int]:
    rng = np.random.default_rng(seed)
    return lambda request: int(rng.integers(1, 12))


def roll_out(search: TreeSearch, count: int = 3, seed: int = 0, **options: Any) -> list[TurnTree]:
    return in_order(search.roll_out(questions(count), prompts(questions(count)), seed=seed, **options))


SHAPES = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(["entropy", "random", "chain"]),
        "initial_chains": st.integers(1, 5),
        "expansion_rounds": st.integers(0, 3),
        "expansions_per_round": st.integers(0, 4),
        "samples_per_tree": st.none() | st.integers(1, 9),
        "max_response_tokens": st.integers(5, 300),
        "cache_tokens": st.sampled_from([64, 1500, 100_000]),  # one question at a time, some, all
    }
)


# Fails if the order in which turns or tools finish reaches a tree: its turns' order, what expansion picks (entropy,
# random numbers), which leaves are pruned, the counters, or what a branch samples.
@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 5), st.integers(1, 3), st.booleans(), st.integers(0, 10**6))
def test_both_schedules_give_the_same_trees(
    shape: dict[str, Any], count: int, limit: int, greedy: bool, seed: int
) -> None:
    trees, counters, decoded = [], [], []
    for schedule in ("synchronous", "streaming"):
        engine = ScriptedEngine(by_seed, random_polls(seed))
        search = make_search(engine, RandomSearch(seed), limit=limit, schedule=schedule, **shape)
        progress: list[tuple[int, int, int]] = []
        grown = roll_out(search, count, seed, greedy=greedy, on_progress=lambda *now, seen=progress: seen.append(now))
        trees.append([as_data(tree) for tree in grown])
        counters.append(asdict(search.counters))
        decoded.append(progress[-1])
        assert not engine.in_flight and not engine.live and len(engine.released) == count
    assert trees[0] == trees[1]
    assert counters[0] == counters[1]
    assert decoded[0] == decoded[1]


BRANCHING = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(["arpo", "aepo"]),
        "initial_chains": st.integers(1, 4),
        "samples_per_tree": st.integers(4, 9),
        "entropy_weight": st.sampled_from([0.0, 3.0]),
        "branch_attempts": st.integers(1, 3),
    }
)
CHILDREN = st.fixed_dictionaries(
    {
        "strategy": st.just("tree_grpo"),
        "trees_per_question": st.integers(2, 3),
        "initial_chains": st.integers(2, 3),
        "expansion_rounds": st.integers(0, 3),
        "expansions_per_round": st.integers(0, 3),
        "samples_per_tree": st.none() | st.just(2),
    }
)


# Fails if a draw depends on what finished when, or if a branch or a child starts before the round's other turns are
# there. Every question has its number of trajectories.
@settings(max_examples=30, deadline=None)
@given(BRANCHING | CHILDREN, st.integers(1, 3), st.sampled_from([64, 1500, 100_000]), st.integers(0, 10**6))
def test_both_schedules_draw_the_same(shape: dict[str, Any], limit: int, cache_tokens: int, seed: int) -> None:
    trees, ends = [], []
    for schedule in ("synchronous", "streaming"):
        engine = ScriptedEngine(by_seed, random_polls(seed), tops=lambda token: [-1.0 - token % 3] * 10)
        settings = shape | {"limit": limit, "schedule": schedule, "cache_tokens": cache_tokens}
        search = make_search(engine, RandomSearch(seed, longest=0.001), **settings)
        progress: list[tuple[int, int, int]] = []
        grown = roll_out(search, 2, seed, on_progress=lambda *now, seen=progress: seen.append(now))
        trees.append([as_data(tree) for tree in grown])
        ends.append((progress[-1], asdict(search.counters)))
        assert sum(tree.num_trajectories for tree in grown) == 2 * search.rollout.leaves
        assert progress[-1][0] == progress[-1][1] == len(grown) * search.rollout.grown_leaves
        assert not engine.in_flight and not engine.live and len(engine.released) == len(set(engine.released))
    assert trees[0] == trees[1] and ends[0] == ends[1]


def test_many_questions_with_slow_tools_give_the_same_trees() -> None:
    # As above, with so many turns and waits that nearly every one is overtaken. Fails if streaming keeps the order.
    trees, orders = [], []
    for schedule in ("synchronous", "streaming"):
        engine = ScriptedEngine(by_seed, random_polls(1))
        search = make_search(engine, RandomSearch(2, longest=0.02), schedule=schedule, initial_chains=6)
        trees.append([as_data(tree) for tree in roll_out(search, 10)])
        orders.append([request.seed for batch in engine.batches for request in batch])
    assert trees[0] == trees[1]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_the_synchronous_schedule_repeats_its_batches() -> None:
    # What a batch holds decides the last bits of log-probs. Fails if batches follow the tools' times.
    runs = []
    for seed in (1, 2):
        engine = ScriptedEngine(by_seed, random_polls(seed))
        roll_out(make_search(engine, RandomSearch(seed), schedule="synchronous", cache_tokens=4000))
        runs.append([[(r.turn_key, r.path, r.seed) for r in batch] for batch in engine.batches])
    assert runs[0] == runs[1]


class Gate:
    """A search tool whose answer to one argument waits until the gate is opened."""

    name = "search"

    def __init__(self, argument: str) -> None:
        self.argument, self.open = argument, threading.Event()
        self.waited_in_vain = False

    def __call__(self, argument: str) -> str:
        if argument == self.argument:
            self.waited_in_vain = not self.open.wait(PATIENCE)
        return f"found {argument}"


def question_of(request: Request) -> str:
    return str(request.path[-1].key[0])


def test_nobody_waits_for_the_tool_of_another_question() -> None:
    # The first question's tool answers only after the second question's tree is finished and a third question, for
    # which there was no room, has begun. Fails (in vain) with a barrier per turn, per round or per group.
    gate = Gate("one")

    def script(prompt: str, request: Request) -> str:
        if question_of(request) == "2:q2":
            gate.open.set()
        if "</result>" in prompt:
            return ANSWER
        return "<search> one</search>" if question_of(request) == "0:q0" else "<search> two</search>"

    engine = ScriptedEngine(script)
    search = make_search(engine, gate, cache_tokens=1500, max_response_tokens=100)  # 7 branches of 100 tokens each
    trees = roll_out(search)
    assert not gate.waited_in_vain
    assert [len(tree.leaves) for tree in trees] == [7, 7, 7]
    assert engine.released[0] == "1:q1"
    assert len(engine.batches[0]) == 6  # of two questions


def test_siblings_do_not_wait_for_each_other() -> None:
    # One chain's tool answers only after the two others have ended. Fails with a barrier per turn.
    gate, ends = Gate("one"), []

    def script(prompt: str, request: Request) -> str:
        if "</result>" in prompt:
            ends.append(request.turn_key)
            if len(ends) == 2:
                gate.open.set()
            return ANSWER
        return "<search> one</search>" if request.turn_key[1] == 2 else "<search> two</search>"

    (tree,) = roll_out(make_search(ScriptedEngine(script), gate, strategy="chain"), 1)
    assert not gate.waited_in_vain
    # Written last, but by the second chain: level by level, and in a level by chains.
    assert [turn.parent for turn in tree.turns] == [-1, 0, 0, 0, 1, 2, 3]
    assert tree.turns[2].action_ids.tolist() == encode("<search> one</search>")


def test_the_engine_is_not_polled_while_all_wait_for_tools() -> None:
    # Fails if the search spins: polls of an idle engine would be counted in the hundreds.
    polls: list[int] = []

    class Counting(ScriptedEngine):
        def poll(self) -> list[tuple[TurnKey, Completion]]:
            polls.append(len(self.in_flight))
            return super().poll()

    search = make_search(Counting(search_then_answer), RandomSearch(0, longest=0.05), strategy="chain")
    roll_out(search)
    assert min(polls) > 0 and len(polls) <= 2 * 9


# ---- stragglers


class Slow:
    """Answers one argument only when it is told to."""

    name = "search"

    def __init__(self, argument: str) -> None:
        self.argument, self.enough = argument, threading.Event()

    def __call__(self, argument: str) -> str:
        if argument == self.argument:
            self.enough.wait(PATIENCE)
        return "found it"


class Clock:
    """In place of the rollout's `time`: a second passes whenever it is looked at, while `running` says so."""

    def __init__(self, running: Callable[[], bool]) -> None:
        self.running, self.seconds = running, 0.0

    def monotonic(self) -> float:
        self.seconds += self.running()
        return self.seconds


def one_of_three(prompt: str, request: Request) -> str:
    """The second chain asks something else."""
    if "</result>" in prompt:
        return ANSWER
    return "<search> one</search>" if request.turn_key[1] == 2 else "<search> two</search>"


def test_the_straggler_cap_ends_the_last_branch(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fails if the cap is ignored (the tool never answers in time), takes other branches too, or is not told.
    tool = Slow("one")
    search = make_search(ScriptedEngine(one_of_three), tool, strategy="chain", straggler_seconds=0.05)
    monkeypatch.setattr(growth, "time", Clock(lambda: not tool.enough.is_set()))
    with caplog.at_level(logging.WARNING):
        first, second = roll_out(search, 2)
    tool.enough.set()
    for tree in (first, second):
        assert [turn.parent for turn in tree.turns] == [-1, 0, 0, 0, 1, 3]
        late = tree.turns[2]
        assert (late.finish_reason, late.tool, len(late.observation_ids)) == ("stop", "search", 0)
    assert search.counters.timed_out_turns == 2 and search.counters.failed_trees == 0
    assert (search.counters.tool_calls, search.counters.failed_tool_calls) == (6, 0)
    assert "question 'q0': 1 of 3 branches end without a tool's answer" in caplog.text
    assert len(roll_out(search, 1)[0].turns) == 7 and search.counters.timed_out_turns == 2  # the next one is whole


def test_the_late_answer_of_a_straggler_finds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    # It comes while the other question goes on. Fails if it is taken for a branch that has ended.
    given_up = threading.Event()

    def search(argument: str) -> str:
        if argument == "one":
            given_up.wait(PATIENCE)
        elif argument == "three":
            while not searches.counters.timed_out_turns:
                time.sleep(0.001)
            given_up.set()
            while ToolCall("search", "one") in searches.toolbox._in_flight:  # answers come in order
                time.sleep(0.001)
        return "found it"

    def script(prompt: str, request: Request) -> str:
        if question_of(request) == "1:q1" and "</result>" not in prompt:
            return "<search> three</search>"
        return one_of_three(prompt, request)

    searches = make_search(ScriptedEngine(script), search, strategy="chain", straggler_seconds=0.05)
    monkeypatch.setattr(growth, "time", Clock(lambda: not searches.counters.timed_out_turns))
    first, second = roll_out(searches, 2)
    assert searches.counters.timed_out_turns == 1 and searches.counters.failed_tool_calls == 0
    assert len(first.turns[2].observation_ids) == 0 and len(second.turns) == 7


def test_the_straggler_cap_spares_what_is_no_straggler(monkeypatch: pytest.MonkeyPatch) -> None:
    # All wait (nobody has ended), and a lone chain has no others to keep waiting: fails if they are cut too.
    for chains in (1, 3):
        tool = Slow("two")

        def running(tool: Slow = tool, looks: Iterator[int] = itertools.count()) -> bool:  # noqa: B008
            if next(looks) > 5:
                tool.enough.set()
            return not tool.enough.is_set()

        monkeypatch.setattr(growth, "time", Clock(running))
        search = make_search(
            ScriptedEngine(search_then_answer),
            tool,
            strategy="chain",
            initial_chains=chains,
            straggler_seconds=0.01,
        )
        (tree,) = roll_out(search, 1)
        assert search.counters.timed_out_turns == 0 and len(tree.turns) == 1 + 2 * chains


# ---- failures


def test_an_engine_failure_names_its_questions_and_leaves_nothing() -> None:
    # The first question waits for a tool when the engine fails over the second. Fails if the message blames the first,
    # or requests or cache entries of either stay in the engine.
    gate, broken = Gate("one"), True

    def script(prompt: str, request: Request) -> str:
        if "</result>" in prompt:
            if broken:
                raise MemoryError("no room")
            return ANSWER
        return "<search> one</search>" if question_of(request) == "0:q0" else "<search> two</search>"

    engine = ScriptedEngine(script, polls=lambda request: 2)
    search = make_search(engine, gate)
    with pytest.raises(RuntimeError, match=r"questions \['q1'\]: no room"):
        roll_out(search, 2)
    assert not engine.live and not engine.in_flight and sorted(engine.released) == ["0:q0", "1:q1"]
    broken = False
    gate.open.set()
    expected = roll_out(make_search(ScriptedEngine(script)), 2)
    assert [as_data(tree) for tree in roll_out(search, 2)] == [as_data(tree) for tree in expected]


class FailingToolBox(ToolBox):
    """Futures that fail, or that somebody has cancelled."""

    def submit(self, call: Any) -> Future[ToolResult]:
        future: Future[ToolResult] = Future()
        if len(call.argument) > 3:
            future.cancel()
            future.set_running_or_notify_cancel()
        else:
            future.set_exception(OSError("the pool is gone"))
        return future


def test_a_failed_future_is_an_observation() -> None:
    # Fails if the exception of a future ends the roll-out, or its call is not counted as failed.
    def script(prompt: str, request: Request) -> str:
        if "</result>" in prompt:
            return ANSWER
        return "<search> three</search>" if request.turn_key[1] == 2 else "<search> two</search>"

    search = make_search(ScriptedEngine(script), strategy="chain")
    search.toolbox = FailingToolBox([Search()])
    (tree,) = roll_out(search, 1)
    assert len(tree.leaves) == 3 and all(tree.turns[leaf].finish_reason == "eos" for leaf in tree.leaves)
    for turn, problem in ((1, "OSError: the pool is gone"), (2, "CancelledError: ")):
        expected = encode(format_result(f"Tool(search) failed: {problem}"))
        assert tree.turns[turn].observation_ids.tolist() == expected
    assert (search.counters.tool_calls, search.counters.failed_tool_calls) == (3, 3)


class StopRequested(Exception):
    pass


@pytest.mark.parametrize("waiting", [True, False])
def test_progress_can_stop_a_roll_out(waiting: bool) -> None:
    # Also while all wait for a tool that never answers. Fails if the callback is not called then, or if its exception
    # leaves requests in the engine.
    gate = Gate("two")
    if not waiting:
        gate.open.set()
    engine = ScriptedEngine(search_then_answer, random_polls(0))
    search = make_search(engine, gate)
    calls = 0

    def stop(leaves: int, total: int, decoded: int) -> None:
        nonlocal calls
        calls += 1
        if engine.in_flight or (calls > 1 and decoded == 6 * 3):  # 6 chains of 3 tokens: all of the first turns
            assert not engine.in_flight or not waiting
            raise StopRequested

    if waiting:
        engine.polls = lambda request: 1
    with pytest.raises(StopRequested):
        roll_out(search, 2, on_progress=stop)
    assert not engine.in_flight and not engine.live and sorted(engine.released) == ["0:q0", "1:q1"]
    gate.open.set()
    assert [len(tree.leaves) for tree in roll_out(search, 2)] == [7, 7]


def test_phases_tell_work_from_waiting() -> None:
    # Fails if waiting for tools is timed while the engine has work, or the engine's work is not timed.
    engine = ScriptedEngine(by_seed, random_polls(3))
    seen: list[tuple[str, int]] = []

    class Timer:
        @contextmanager
        def phase(self, name: str) -> Iterator[None]:
            seen.append((name, len(engine.in_flight)))
            yield

    roll_out(make_search(engine, RandomSearch(0)), timer=Timer())
    assert {name for name, _ in seen} == {"rollout/generate", "rollout/tools"}
    assert all(not in_flight for name, in_flight in seen if name == "rollout/tools")


# ---- room in the cache


def test_the_cache_budget_learns_from_finished_trees() -> None:
    # Fails if the guess forgets the last roll-out, keeps one for ever, or counts less than a tree has already.
    budget = CacheBudget(cache_tokens=1000, branches=4)
    searches = make_search(ScriptedEngine(by_seed), max_response_tokens=200)._searches(
        questions(3), prompts(questions(3)), 0, 1
    )
    first, second, third = searches
    prompt = first.prompt_tokens
    budget.begin()
    assert not budget.has_room([first], second)  # 4 branches x 200 tokens each
    first.tokens = prompt + 4 * 80
    budget.finished(first)
    assert budget.has_room([second], third)  # 4 x 80 x 1.25 tokens each
    second.tokens = 900
    assert not budget.has_room([second], third)
    budget.begin()
    second.tokens = prompt
    assert budget.has_room([second], third)
    third.tokens = prompt + 4 * 190
    budget.finished(third)
    assert not budget.has_room([first], second)
    budget.begin()
    first.tokens = prompt + 4 * 10
    budget.finished(first)
    assert not budget.has_room([first], second)  # still: the last roll-out had a large one
    budget.begin()
    assert budget.has_room([first], second)
