"""Tree-GRPO's roll-out, decision by decision: what is written and drawn is fixed, the trees are worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atpo_fast.config import RolloutConfig
from atpo_fast.engines.base import Request
from atpo_fast.rollout import in_order
from atpo_fast.rollout.branch import QuestionSearch
from atpo_fast.tree import TurnTree
from tests.helpers.scripted_engine import (
    ANSWER,
    ScriptedEngine,
    as_data,
    by_seed,
    encode,
    make_search,
    prompts,
    questions,
    roll_out,
)

CALL = " one<search> two</search>"
SHAPE: dict[str, Any] = {"strategy": "tree_grpo", "trees_per_question": 2, "initial_chains": 1}


class Places:
    """In place of the generators: which of the candidates are drawn, by round; and how many candidates there were."""

    def __init__(self, rounds: list[list[int]]) -> None:
        self.rounds, self.candidates = rounds, [0] * len(rounds)
        self.number = 0

    def generator(self, search: QuestionSearch, purpose: str, number: int) -> Places:
        self.number = number
        return self

    def integers(self, high: int, size: int) -> np.ndarray:
        self.candidates[self.number] = high
        assert len(self.rounds[self.number]) == size
        return np.array(self.rounds[self.number])


def grow(
    monkeypatch: pytest.MonkeyPatch, written: str, places: list[list[int]], **settings: Any
) -> tuple[list[TurnTree], Places]:
    """Roll out a question, each of whose trees writes what the letters of `written` say: s a call, . the answer."""
    fixed = Places(places)
    monkeypatch.setattr(QuestionSearch, "generator", lambda *given: fixed.generator(*given))

    def script(prompt: str, request: Request) -> str:
        return CALL if written[request.turn_key[1] - 1] == "s" else ANSWER

    search = make_search(ScriptedEngine(script), **(SHAPE | settings))
    return roll_out(search, questions(1)), fixed


def test_children_continue_from_the_drawn_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    # The chain is 1 (call), 2 (call), 3 (answer), so root, 1 and 2 are candidates. Drawn are 2, twice: two more answers
    # to the same evidence, 4 and 5. Then root and 1: 6 (call) with 7 after it, and 8. Fails if a sibling of the drawn
    # turn grows, if a turn cannot be drawn twice, or if the root or a leaf is (not) a candidate.
    trees, fixed = grow(
        monkeypatch, "ss...s..", [[2, 2], [0, 1]], expansion_rounds=2, expansions_per_round=2, samples_per_tree=None
    )
    assert fixed.candidates == [3, 3]
    for tree in trees:
        assert [turn.parent for turn in tree.turns] == [-1, 0, 1, 2, 2, 2, 0, 1, 6]
        assert len(tree.leaves) == 5
    assert [tree.meta["tree"] for tree in trees] == [0, 1] and {tree.question_id for tree in trees} == {"q0"}


def test_a_child_sees_the_result_and_counts_the_calls_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # One call is allowed. The chain's second call is its forced last turn, and so is the child of turn 1, though it
    # calls. Fails if the limit counts from the child, if a notice or an end token is added, or if the result is not
    # part of what the child continues.
    trees, _ = grow(monkeypatch, "sss", [[1]], expansion_rounds=1, expansions_per_round=1, limit=1)
    for tree in trees:
        assert [turn.parent for turn in tree.turns] == [-1, 0, 1, 1]
        for leaf in (2, 3):
            turn = tree.turns[leaf]
            assert (turn.finish_reason, turn.tool, len(turn.observation_ids)) == ("stop", None, 0)
            assert turn.action_ids.tolist() == encode(CALL)


def test_some_leaves_are_kept_at_random() -> None:
    # Fails if the first or the newest are kept, if fewer are, or if the trees of a question repeat each other.
    settings: dict[str, Any] = {"expansion_rounds": 2, "expansions_per_round": 2}
    whole = roll_out(make_search(ScriptedEngine(by_seed), **SHAPE, **settings), questions(4), 1)
    search = make_search(ScriptedEngine(by_seed), **SHAPE, **settings, samples_per_tree=3)
    found = list(search.roll_out(questions(4), prompts(questions(4)), seed=1))
    assert sorted(index for index, _ in found) == [0, 0, 1, 1, 2, 2, 3, 3]
    kept = in_order(found)
    assert [(tree.question_id, tree.meta["tree"]) for tree in kept] == [(f"q{i}", t) for i in range(4) for t in (0, 1)]
    places = set()
    for all_of, some in zip(whole, kept, strict=True):
        assert (len(all_of.leaves), len(some.leaves), some.num_trajectories) == (5, 3, 3)
        paths = [tuple(all_of.path_ids(leaf)) for leaf in all_of.leaves]
        places |= {tuple(paths.index(tuple(some.path_ids(leaf))) for leaf in some.leaves)}
    assert len(places) > 2
    assert as_data(whole[0]) != as_data(whole[1])


def test_evaluation_grows_one_chain() -> None:
    # Fails if evaluation grows as many trees as training, or branches.
    trees = roll_out(make_search(ScriptedEngine(by_seed), **SHAPE), questions(3), greedy=True)
    assert [len(tree.leaves) for tree in trees] == [1, 1, 1] and "tree" not in trees[0].meta


def test_the_published_setting_has_six_leaves_a_question() -> None:
    # Fails if leaves are counted by tree: m2 n2 l1 k3.
    shape: dict[str, Any] = {"expansion_rounds": 1, "expansions_per_round": 2, "samples_per_tree": 3}
    config = RolloutConfig(**SHAPE, **shape)
    assert (config.grown_leaves, config.leaves_per_tree, config.leaves) == (3, 3, 6)
