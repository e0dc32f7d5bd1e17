"""A flat batch packs into rows that give the flat batch's loss and gradients (docs/design.md#flat-batches)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atpo_fast import Objective, assign_credit, from_trajectories, pack_trees
from atpo_fast.packing import PackedTrees, Trajectories
from tests.helpers.flat_reference import DOUBLE, Flat, ToyModel, assert_equal, flat_loss, flatten, packed_loss
from tests.helpers.strategies import VOCAB, forests, special_forest

AGGREGATIONS = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "turn-mean")
WIDE = {"clip_low": 0.4, "clip_high": 0.5, "max_length": 9}


def batch(flats: Sequence[Flat], **more: Any) -> Trajectories:
    return Trajectories(
        input_ids=[flat.ids for flat in flats],
        loss_mask=[flat.mask for flat in flats],
        advantages=[np.array(flat.advantage) for flat in flats],
        old_logprobs=[np.array(flat.old) for flat in flats],
        **more,
    )


def runs_as_turns(flat: Flat) -> Flat:
    """The same trajectory with turns as a trainer knows them: maximal runs of the mask."""
    turn, turns = -1, []
    for t, acts in enumerate(flat.mask):
        turn += bool(acts and not (t and flat.mask[t - 1]))
        turns.append(turn)
    return Flat(flat.ids, flat.mask, flat.advantage, turns, flat.old, flat.rollout, flat.ref)


@st.composite
def flat_batches(draw: st.DrawFn) -> list[Flat]:
    """Trajectories over two ids, whose prefixes meet and part anywhere; old log-probs follow the prefix, mostly."""
    flats = []
    for _ in range(draw(st.integers(1, 6))):
        size = draw(st.integers(1, 8))
        ids = [1, *draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))]
        mask = [0, *draw(st.lists(st.sampled_from([0, 1, 1]), min_size=size, max_size=size))]
        other_engine = draw(st.sampled_from([0.0, 0.0, 0.1]))
        old = [-0.5 - 0.3 * token - other_engine * (t == 2) for t, token in enumerate(ids)]
        advantage = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5]), min_size=size + 1, max_size=size + 1))
        if draw(st.booleans()):
            advantage = [advantage[0]] * (size + 1)
        flats.append(runs_as_turns(Flat(ids, mask, advantage, [], old, old, old)))
    return flats


# Fails when tokens with different masks, log-probs or (level turn) unequal turns merge, when a weight is lost where
# trajectories end inside others or are identical, when split turns count as turns, or a split misses an advantage.
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    flats=flat_batches(),
    level=st.sampled_from(["token", "turn", "sequence"]),
    aggregation=st.sampled_from(AGGREGATIONS),
    slack=st.integers(0, 9),
    kl=st.sampled_from([0.0, 0.1]),
)
def test_random_batches(flats: list[Flat], level: str, aggregation: str, slack: int, kl: float) -> None:
    model = ToyModel(2)
    objective = Objective.preset("at2po", level=level, aggregation=aggregation, kl="k2", kl_coef=kl, **WIDE)

    def fill(row: PackedTrees) -> None:
        assert row.old_logprob is not None
        row.ref_logprob = row.old_logprob

    rows = from_trajectories(batch(flats), objective, max(len(f.ids) for f in flats) + slack, dtype=DOUBLE)
    assert_equal(packed_loss(model, rows, objective, fill), flat_loss(model, flats, objective), model)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trees=forests(), level=st.sampled_from(["token", "sequence"]))
def test_written_out_trees_merge_again(trees: list[Any], level: str) -> None:
    """Trajectories of trees give the trees' loss, in no more tokens."""
    objective = Objective.preset("at2po", level=level, **WIDE)
    flats = flatten(trees)
    groups = [t for t, tree in enumerate(trees) for _ in range(tree.num_trajectories)]
    rows = from_trajectories(batch(flats, group_ids=groups), objective, 200, dtype=DOUBLE, prune=False)
    assert sum(row.unique_tokens for row in rows) <= sum(tree.unique_tokens for tree in trees)
    assert sum(row.flat_tokens for row in rows) == sum(tree.flat_tokens for tree in trees)
    model = ToyModel(VOCAB)
    packed = packed_loss(model, pack_trees(trees, objective, 200, dtype=DOUBLE, prune=False), objective)
    assert_equal(packed_loss(model, rows, objective), packed, model)


# Prompt 1 2; actions 3 4 | 3 5 | 3 4 again. Token level: 1 2 3 4 5, the shared 3 counted three times. Turn level: the
# turns (3 4) and (3 5) differ, so 3 is there twice. Fails when turns merge in part, or tokens not at all.
@pytest.mark.parametrize(
    ("level", "ids", "counts"),
    [("token", [1, 2, 3, 4, 5], [3, 2, 1]), ("turn", [1, 2, 3, 4, 3, 5], [2, 2, 1, 1])],
)
def test_what_merges(level: str, ids: list[int], counts: list[int]) -> None:
    given_batch = {
        "input_ids": [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4]],
        "loss_mask": [[0, 0, 1, 1]] * 3,
        "advantages": [1.0, -1.0, 2.0],
        "old_logprobs": [[-1.0, -1.0]] * 3,
    }
    (row,) = from_trajectories(given_batch, Objective.preset("at2po", level=level), 100)
    assert row.input_ids.tolist() == ids
    assert row.trajectory_count.tolist() == counts
    assert sorted(row.leaf_multiplicity.tolist()) == [1, 2]
    assert row.flat_tokens == 12


# Equal turns with different observations are one turn. Fails when whole turns are kept apart by what follows them.
def test_equal_turns_merge_before_different_observations() -> None:
    given_batch = {
        "input_ids": [[1, 2, 3, 4, 5], [1, 2, 3, 6, 5], [1, 2, 3]],
        "loss_mask": [[0, 1, 1, 0, 1], [0, 1, 1, 0, 1], [0, 1, 1]],
        "advantages": [1.0, 1.0, 1.0],
        "old_logprobs": [[-1.0] * 3, [-1.0] * 3, [-1.0] * 2],
    }
    (row,) = from_trajectories(given_batch, Objective.preset("at2po"), 100)
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 5]
    assert row.trajectory_count.tolist() == [3, 3, 1, 1]
    assert row.turn_offsets.tolist() == [0, 2, 3, 4]


# Tokens 1 | 2 3 with actions 2 and 3, twice. A difference in either log-prob of 2 keeps both copies of 2 and 3; prompts
# merge all the same. Fails when action tokens of different log-probs become one.
@pytest.mark.parametrize("name", ["old_logprobs", "rollout_logprobs"])
@pytest.mark.parametrize("level", ["token", "turn"])
def test_different_logprobs_do_not_merge(name: str, level: str) -> None:
    given_batch = {
        "input_ids": [[1, 2, 3]] * 2,
        "loss_mask": [[0, 1, 1]] * 2,
        "advantages": [1.0, 1.0],
        "old_logprobs": [[-1.0, -1.0]] * 2,
        "rollout_logprobs": [[-1.0, -1.0]] * 2,
    }
    objective = Objective.preset("at2po", level=level)
    (row,) = from_trajectories(given_batch, objective, 100)
    assert row.input_ids.tolist() == [1, 2, 3]
    (row,) = from_trajectories(given_batch | {name: [[-1.0, -1.0], [-1.5, -1.0]]}, objective, 100)
    assert row.input_ids.tolist() == [1, 2, 3, 2, 3]


# Fails when the padding side, the mask of padded tensors, or the way advantages are given changes the rows.
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("per", ["trajectory", "turn", "token"])
def test_padded_tensors_equal_lists(side: str, per: str) -> None:
    ids = [[1, 2, 3, 4, 5], [1, 2, 3]]
    mask = [[0, 1, 1, 0, 1], [0, 1, 1]]
    old = [[0.0, -1.0, -2.0, 0.0, -3.0], [0.0, -1.0, -2.0]]
    advantages: dict[str, list[Any]] = {
        "trajectory": [1.0, -1.0],
        "turn": [[1.0, 1.0], [-1.0]],
        "token": [[0.0, 1.0, 1.0, 0.0, 1.0], [0.0, -1.0, -1.0]],
    }

    def pad(rows: Sequence[Sequence[float]]) -> torch.Tensor:
        return torch.tensor(
            [row if len(row) == 5 else [0, 0, *row] if side == "left" else [*row, 0, 0] for row in rows]
        )

    objective = Objective.preset("at2po")
    of_lists = from_trajectories(
        Trajectories(input_ids=ids, loss_mask=mask, advantages=advantages[per], old_logprobs=old), objective, 9
    )
    given_advantages = pad(advantages["token"]) if per == "token" else advantages[per]
    of_tensors = from_trajectories(
        Trajectories(
            input_ids=pad(ids),
            loss_mask=pad(mask),
            advantages=torch.tensor(given_advantages) if per == "trajectory" else given_advantages,
            old_logprobs=pad(old),
            attention_mask=pad([[1] * len(row) for row in ids]),
        ),
        objective,
        9,
    )
    assert len(of_lists) == len(of_tensors) == 1
    for name in ("input_ids", "subtree_end", "predictor", "weight_pos", "weight_neg", "old_logprob"):
        assert torch.equal(getattr(of_lists[0], name), getattr(of_tensors[0], name)), name


def test_groups_do_not_share() -> None:
    """Equal trajectories of two groups stay apart; group numbers follow the first appearance of the ids."""
    given_batch = {
        "input_ids": [[1, 2], [1, 2]],
        "loss_mask": [[0, 1]] * 2,
        "advantages": [1.0, 1.0],
        "old_logprobs": [[0.0]] * 2,
        "group_ids": ["z", "a"],
    }
    (row,) = from_trajectories(given_batch, Objective.preset("at2po"), 100)
    assert row.input_ids.tolist() == [1, 2, 1, 2]
    assert row.leaf_tree.tolist() == [0, 1]


def test_rollout_logprobs() -> None:
    """They are packed, and tokens that differ in them alone stay apart."""
    trees = special_forest()
    assign_credit(trees)
    flats = [runs_as_turns(flat) for flat in flatten(trees)]
    objective = Objective.preset("grpo", importance_cap=1.01, kl_coef=0.0, **WIDE)
    rows = from_trajectories(batch(flats, rollout_logprobs=[f.rollout for f in flats]), objective, 200, dtype=DOUBLE)
    model = ToyModel(VOCAB)
    assert_equal(packed_loss(model, rows, objective), flat_loss(model, flats, objective), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mask": [[0, 1, 1], [0, 1]]}, "trajectory 1 has 3 tokens but a loss mask of 2"),
        ({"loss_mask": [[0, 1, 1], [1, 1, 1]]}, "trajectory 1 needs a token before its first action"),
        ({"advantages": [1.0]}, "2 trajectories but 1 entries of advantages"),
        ({"advantages": [1.0, [1.0] * 7]}, "trajectory 1 has 3 tokens, 2 action tokens and 1 turns, but 7 advantages"),
        ({"advantages": [1.0, float("nan")]}, "advantages of trajectory 1 are not all finite"),
        ({"old_logprobs": [[0.0, 0.0], [0.0]]}, "but 1 old_logprobs"),
        (
            {
                "input_ids": [[1, 2, 3], [1] * 30],
                "loss_mask": [[0, 1, 1], [0] + [1] * 29],
                "old_logprobs": [[0.0] * 2, [0.0] * 29],
            },
            r"30 tokens \(1 of the prompt \+ 29 of the response\).*train.row_tokens",
        ),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    given_batch: dict[str, Any] = {
        "input_ids": [[1, 2, 3], [1, 2, 3]],
        "loss_mask": [[0, 1, 1], [0, 1, 1]],
        "advantages": [1.0, 1.0],
        "old_logprobs": [[0.0, 0.0], [0.0, 0.0]],
    }
    with pytest.raises(ValueError, match=message):
        from_trajectories(given_batch | change, Objective.preset("at2po"), 20)


def test_none_is_a_logprob_that_nobody_sampled() -> None:
    """Fails if None on tool tokens is not read as NaN is, or passes where a token was sampled."""
    given_batch: dict[str, Any] = {
        "input_ids": [[1, 2, 3, 4, 5], [1, 2, 6]],
        "loss_mask": [[0, 1, 0, 0, 1], [0, 1, 1]],
        "advantages": [[None, 1.0, None, None, 1.0], [None, -1.0, -1.0]],
        "old_logprobs": [[None, -0.5, None, None, -1], [None, -0.5, -2.0]],
    }
    objective = Objective.preset("at2po")
    as_nan = {
        name: [[float("nan") if value is None else value for value in row] for row in given_batch[name]]
        for name in ("advantages", "old_logprobs")
    }
    rows = from_trajectories(given_batch, objective, 20)
    for row, other in zip(rows, from_trajectories(given_batch | as_nan, objective, 20), strict=True):
        assert row.old_logprob is not None and other.old_logprob is not None
        assert torch.equal(row.old_logprob, other.old_logprob) and torch.equal(row.weight_pos, other.weight_pos)
    padded = [[None, -0.5, None, None, -1], [None, -0.5, -2.0, None, None]]
    ids, mask = [[1, 2, 3, 4, 5], [1, 2, 6, 0, 0]], [[0, 1, 0, 0, 1], [0, 1, 1, 0, 0]]
    real = [[1] * 5, [1, 1, 1, 0, 0]]
    more = {"input_ids": ids, "loss_mask": mask, "old_logprobs": padded, "attention_mask": real}
    (row,) = from_trajectories(given_batch | more, objective, 20)
    assert torch.equal(row.input_ids, rows[0].input_ids)
    for name in ("old_logprobs", "rollout_logprobs"):
        values = [[None, -0.5, None, None, None], [None, -0.5, -2.0]]
        message = rf"{name} of trajectory 0 .* action token 1 \(token 4\) has nan; None and NaN .* loss_mask is 0"
        with pytest.raises(ValueError, match=message):
            from_trajectories(given_batch | {name: values}, objective, 20)


def test_empty_batch() -> None:
    nothing = Trajectories(input_ids=[], loss_mask=[], advantages=[], old_logprobs=[])
    assert from_trajectories(nothing, Objective.preset("at2po"), 20) == []
