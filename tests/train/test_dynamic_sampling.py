"""Dynamic sampling: which groups are dropped, how a step is filled, and what is kept for the next one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from atpo_fast.common.errors import CheckpointError, DynamicSamplingError
from atpo_fast.config import Config, DynamicSamplingConfig
from atpo_fast.data.questions import Question
from atpo_fast.environment.reward import LeafScore
from atpo_fast.telemetry import PhaseTimer
from atpo_fast.train import dynamic_sampling
from atpo_fast.train.dynamic_sampling import (
    Filled,
    describe,
    fill,
    read_surplus,
    sampling_metrics,
    varies,
    write_surplus,
)
from atpo_fast.train.run import Run
from atpo_fast.train.schedule import Draw, draw_questions, sampling_seed
from atpo_fast.train.scoring import Group, ScoredTree
from atpo_fast.tree import TurnTree

QUESTIONS = [Question(id=f"q{i}", text="?", answers=("a",)) for i in range(50)]


def group(place: int, *rewards: float, trees: int = 1, copies: int = 1, em: float = 0.0) -> Group:
    """A group whose leaves have these rewards, each in a turn of its own; the last leaf counts `copies` times."""
    made = []
    for t in range(trees):
        tree, scores = TurnTree([1], question_id=QUESTIONS[place].id), []
        for reward in rewards[t::trees]:
            leaf = tree.add_turn(0, [2], [-0.5])
            tree.set_reward(leaf, reward)
            scores.append(
                LeafScore(turn=leaf, reward=reward, em=em, f1=em, format_ok=True, tool_calls=0, turns=1, answer=None)
            )
        if tree.leaves:
            tree.set_multiplicity(tree.leaves[-1], copies)
        made.append(ScoredTree(QUESTIONS[place], tree, scores))
    return Group(place, 0, made)


class Script:
    """Roll-outs of scripted groups: `x` varies, `.` does not; counts how often it was asked."""

    def __init__(self, *rollouts: str) -> None:
        self.rollouts, self.asked, self.place = rollouts, list[int](), 0

    def __call__(self, rollout: int) -> list[Group]:
        self.asked.append(rollout)
        kinds = self.rollouts[rollout]
        first, self.place = self.place, self.place + len(kinds)
        return [group(first + i, 0.0, float(kind == "x")) for i, kind in enumerate(kinds)]


def settings(**given: Any) -> DynamicSamplingConfig:
    return DynamicSamplingConfig(enabled=True, **given)


def places(groups: list[Group]) -> list[int]:
    return [each.place for each in groups]


# 0.1 + 0.2 and 0.3 differ in float64, and ten times 0.1 has a std of 1e-17 when it is computed: equality decides. Fails
# when a group of one is dropped, copies make it a group of one, a question's trees are looked at one by one, or the
# metric is ignored.
def test_which_groups_vary() -> None:
    assert varies(group(0, 0.0, 1.0), "reward")
    assert not varies(group(0, *[0.1] * 10), "reward")
    assert varies(group(0, 0.5), "reward")
    assert not varies(group(0, 0.5, copies=2), "reward")
    assert varies(group(0, 0.0, 1.0, trees=2), "reward")  # two trees of one leaf each
    assert not varies(group(0, 0.0, 1.0), "em")
    assert not varies(Group(0, 0, [ScoredTree(QUESTIONS[0], TurnTree([1]), [])]), "reward")


def test_without_it_a_step_is_one_roll_out() -> None:
    """Fails if anything is dropped or refilled while it is off."""
    script = Script("..x.")
    filled = fill(4, [], script, DynamicSamplingConfig())
    assert places(filled.groups) == places(filled.rolled_out) == [0, 1, 2, 3]
    assert script.asked == [0] and not filled.kept


# Fails when dropped groups come back, groups are taken out of order, a full step goes on, or the surplus is lost.
@pytest.mark.parametrize("surplus", ["discard", "keep"])
def test_a_step_is_refilled_in_order(surplus: str) -> None:
    script = Script("x..x", "....", ".xxx", "xxxx")
    filled = fill(4, [], script, settings(surplus=surplus))
    assert places(filled.groups) == [0, 3, 9, 10] and script.asked == [0, 1, 2]
    assert (filled.dropped, filled.refills, len(filled.rolled_out)) == (7, 2, 12)
    assert (places(filled.kept), filled.discarded) == (([11], 0) if surplus == "keep" else ([], 1))
    metrics = sampling_metrics(filled)
    assert metrics["sampling/questions"] == 12
    assert sum(metrics[f"sampling/{what}"] for what in ("dropped", "discarded", "kept", "trained")) == 12
    said = describe(filled, 4, "reward")
    assert "7 of 12 questions had no variance in reward" in said and "2 refills" in said
    assert ("1 kept" in said) == (surplus == "keep") and ("1 thrown away" in said) == (surplus == "discard")


def test_what_was_kept_comes_first() -> None:
    """Fails when the surplus is judged or counted again, or comes after the new questions."""
    script = Script("xx.x")
    filled = fill(3, [group(20, 0.0, 1.0)], script, settings(surplus="keep"))
    assert places(filled.groups) == [20, 0, 1] and places(filled.kept) == [3]
    assert len(filled.rolled_out) == 4 and filled.refills == 0


# Fails when the bound is off by one, the run ends without saying what to do, or goes on without saying that it did.
def test_refills_are_bounded() -> None:
    script = Script(".x", "..", "x.", "xx")
    with pytest.raises(DynamicSamplingError, match=r"6 questions in 3 roll-outs gave 2 of 3 .*max_refills"):
        fill(3, [], script, settings(max_refills=2))
    script = Script(".x", "..", "x.", "xx")
    filled = fill(3, [], script, settings(max_refills=2, on_exhausted="continue"))
    assert places(filled.groups) == [1, 4] and script.asked == [0, 1, 2]
    assert "the step is smaller" in describe(filled, 3, "reward")
    nothing = fill(2, [], Script(".."), settings(max_refills=0, on_exhausted="continue"))
    assert nothing.groups == [] and nothing.refills == 0


def run(monkeypatch: pytest.MonkeyPatch, questions: list[Question]) -> Run:
    """What `read_surplus` needs of a run; scores are the rewards that the trees have."""

    def score(_: Run, asked: list[Question], trees: list[TurnTree]) -> list[ScoredTree]:
        return [ScoredTree(question, tree, []) for question, tree in zip(asked, trees, strict=True)]

    monkeypatch.setattr(dynamic_sampling, "score", score)
    return cast(Run, SimpleNamespace(task=SimpleNamespace(train=questions), config=Config(seed=5), timer=PhaseTimer()))


# Fails when the trees of a group are given to another, their age is forgotten, or data that has changed goes unnoticed.
def test_kept_groups_survive_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = draw_questions(QUESTIONS, 5, 0, 60)  # places beyond the first epoch too
    kept = []
    for place, trees in ((3, 2), (55, 1)):
        each = group(0, 0.0, 1.0, 0.0, trees=trees)
        for scored in each.trees:
            scored.tree.question_id = order[place].id
        kept.append(Group(place, 7, each.trees))
    write_surplus(tmp_path, kept)
    state = [[each.place, each.weights_step, len(each.trees)] for each in kept]
    found = read_surplus(run(monkeypatch, QUESTIONS), tmp_path, state)
    assert [(each.place, each.weights_step) for each in found] == [(3, 7), (55, 7)]
    for each, expected in zip(found, kept, strict=True):
        assert [scored.question for scored in each.trees] == [order[each.place]] * len(expected.trees)
        for scored, other in zip(each.trees, expected.trees, strict=True):
            assert [turn.logprobs.tolist() for turn in scored.tree.turns] == [
                turn.logprobs.tolist() for turn in other.tree.turns
            ]
    with pytest.raises(CheckpointError, match="has the data changed"):
        read_surplus(run(monkeypatch, QUESTIONS[:40]), tmp_path, state)
    assert read_surplus(run(monkeypatch, QUESTIONS), tmp_path / "none", []) == []


# Fails when a place depends on how many are asked at once, an epoch repeats the order of the one before, or a question
# that comes again in the same step would be given the same trees.
def test_the_order_of_questions_is_one() -> None:
    whole = draw_questions(QUESTIONS, 0, 0, 120)
    assert [draw_questions(QUESTIONS, 0, place, 1)[0] for place in range(120)] == whole
    assert sorted(q.id for q in whole[:50]) == sorted(q.id for q in QUESTIONS) and whole[:50] != whole[50:100]
    seeds = {sampling_seed(0, Draw(step, 0, 4, refill)) for step in range(3) for refill in range(3)}
    assert len(seeds) == 9
    assert sampling_seed(0, Draw(1, 0, 4)) == sampling_seed(0, Draw(1, 9, 2))


def test_filled_holds_only_what_trains() -> None:
    """Fails if a dropped group stays among those that credit and denominators see."""
    filled: Filled = fill(2, [], Script("x.x."), settings())
    assert all(varies(each, "reward") for each in filled.groups)
