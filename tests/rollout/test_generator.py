"""The tree search as a generator: trees come as they are finished, and closing it leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Generator
from concurrent.futures import Future
from typing import Any

import pytest

from atpo_fast.engines.base import Request
from atpo_fast.environment import ToolBox, ToolCall, ToolResult
from atpo_fast.rollout import TreeSearch
from atpo_fast.rollout.branch import BranchState
from atpo_fast.tree import TurnTree
from tests.helpers.scripted_engine import (
    ANSWER,
    ScriptedEngine,
    Search,
    as_data,
    by_seed,
    make_search,
    prompts,
    questions,
    roll_out,
    search_then_answer,
)

PATIENCE = 4.0  # seconds until a test that waits for what never happens fails


def trees_of(search: TreeSearch, count: int, **options: Any) -> Generator[tuple[int, TurnTree], None, None]:
    found = search.roll_out(questions(count), prompts(questions(count)), seed=0, **options)
    assert isinstance(found, Generator)  # it can be closed
    return found


def test_a_tree_comes_before_the_tools_of_another_question_have_answered() -> None:
    # The first question's tool answers only when the test has the second question's tree. Fails (in vain) if trees are
    # kept until all are finished, or come in the order of the questions.
    taken, in_vain = threading.Event(), []

    def search(argument: str) -> str:
        if argument == "one":
            in_vain.append(not taken.wait(PATIENCE))
        return f"found {argument}"

    def script(prompt: str, request: Request) -> str:
        if "</result>" in prompt:
            return ANSWER
        return "<search> one</search>" if request.path[-1].key[0] == "0:q0" else "<search> two</search>"

    trees = trees_of(make_search(ScriptedEngine(script), search, strategy="chain"), 2)
    index, tree = next(trees)
    assert index == 1 and tree.question_id == "q1" and len(tree.leaves) == 3
    taken.set()
    assert [index for index, _ in trees] == [0]
    assert in_vain and not any(in_vain)


def test_the_trees_are_those_of_the_whole_list() -> None:
    # Fails if a tree changes after it was given, is given twice, or is given with another's index.
    expected = [as_data(tree) for tree in roll_out(make_search(ScriptedEngine(by_seed)), questions(5))]
    search = make_search(ScriptedEngine(by_seed), cache_tokens=1500, max_response_tokens=6192)
    given = [(index, as_data(tree)) for index, tree in trees_of(search, 5)]
    assert sorted(given) == list(enumerate(expected))


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_closing_leaves_nothing_in_the_engine(taken: int) -> None:
    # Fails if requests or cache entries of questions that go on stay in the engine, or the search cannot be used again.
    engine = ScriptedEngine(by_seed, polls=lambda request: 1 + request.turn_key[1] % 5)
    search = make_search(engine)
    trees = trees_of(search, 4)
    for _ in range(taken):
        next(trees)
    assert bool(engine.in_flight or engine.live) == (taken > 0)
    trees.close()
    assert not engine.in_flight and not engine.live
    assert search.counters.trees >= taken
    again = [as_data(tree) for tree in roll_out(search, questions(4))]
    assert again == [as_data(tree) for tree in roll_out(make_search(ScriptedEngine(by_seed)), questions(4))]


def test_nothing_happens_before_the_first_tree_is_asked_for() -> None:
    engine = ScriptedEngine(search_then_answer)
    trees_of(make_search(engine), 2).close()
    assert not engine.batches and not engine.released


class PendingToolBox(ToolBox):
    """Calls for `two` are answered at once, the others never; their futures can be cancelled."""

    pending: list[Future[ToolResult]]

    def submit(self, call: ToolCall) -> Future[ToolResult]:
        future: Future[ToolResult] = Future()
        if call.argument == "two":
            future.set_result(ToolResult("found it", ok=True))
        else:
            self.pending.append(future)
        return future


def test_closing_cancels_the_calls_that_nobody_waits_for() -> None:
    # Fails if a tool goes on working for a search that has been closed.
    def script(prompt: str, request: Request) -> str:
        if "</result>" in prompt:
            return ANSWER
        return "<search> one</search>" if request.path[-1].key[0] == "0:q0" else "<search> two</search>"

    engine = ScriptedEngine(script)
    search = make_search(engine, strategy="chain")
    search.toolbox = PendingToolBox([Search()])
    search.toolbox.pending = []
    trees = trees_of(search, 2)
    assert next(trees)[0] == 1
    pending = search.toolbox.pending
    assert len(pending) == 3 and not any(future.cancelled() for future in pending)
    trees.close()
    assert all(future.cancelled() for future in pending)
    assert not engine.live and sorted(engine.released) == ["0:q0", "1:q1"]


def test_each_branch_says_what_it_waits_for() -> None:
    # Fails if the number of branches in a state, on which the barriers of the synchronous schedule stand, drifts from
    # the branches themselves.
    seen: set[BranchState] = set()

    def check(leaves: int, total: int, decoded: int) -> None:
        running = trees.gi_frame.f_locals["self"]  # type: ignore[attr-defined]
        states = [branch.state for search in running.searching for branch in search.round]
        assert {state: number for state, number in running.states.items() if number} == {
            state: states.count(state) for state in set(states)
        }
        assert set(running.writing.values()) == {
            branch for search in running.searching for branch in search.round if branch.state is BranchState.WRITING
        }
        seen.update(states)

    engine = ScriptedEngine(by_seed, polls=lambda request: 1 + request.turn_key[1] % 3)
    trees = trees_of(make_search(engine, Search(), limit=2), 3, on_progress=check)
    assert len(list(trees)) == 3
    assert seen >= {BranchState.READY, BranchState.WRITING, BranchState.ENDED}
