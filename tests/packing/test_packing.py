"""Layout of packed rows, cutting, pruning, denominators and spreading (docs/design.md#packing)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.packing import (
    PackedTrees,
    apply_entropy_advantage,
    empty_row,
    pruned_tokens,
    row_cost,
    spread_rows,
)
from tests.helpers.flat_reference import DOUBLE, ToyModel, assert_equal, flat_loss, flatten, packed_loss, visible_keys
from tests.helpers.strategies import VOCAB, forests, special_forest

TURN = Objective.preset("at2po")
KL = Objective.preset("at2po", kl="k3", kl_coef=0.1)  # nothing is pruned


def forked() -> TurnTree:
    """Prompt 1 2; a = 3 7 (observation 4) with leaves c = 5 and d = 6 (counted twice); leaf b = 8. Turns a, b, c, d."""
    tree = TurnTree([1, 2], question_id="q")
    a = tree.add_turn(0, [3, 7], [-0.1, -0.2], [4])
    tree.add_turn(0, [8], [-0.3])
    tree.add_turn(a, [5], [-0.4])
    tree.set_multiplicity(tree.add_turn(a, [6], [-0.5]), 2)
    tree.advantages = np.array([0.0, 0.5, -1.0, 2.0, -3.0])
    return tree


# Pre-order is root, a, c, d, b: ids 1 2 | 3 7 4 | 5 | 6 | 8. The root ends at 8, a at 7. |y| = 3, 3, 1; B = 1 + 2 + 1.
# w = 1/12 on the paths through a, 1/4 on b. W+(a) = 3/12 * 0.5, W+(c) = 2/12, W-(d) = 2 * 3/12, W-(b) = 1/4.
# Fails when any field of a whole tree is misplaced.
def test_layout_by_hand() -> None:
    (row,) = pack_trees([forked()], TURN, 8, dtype=DOUBLE)
    assert row.input_ids.tolist() == [1, 2, 3, 7, 4, 5, 6, 8]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 5, 2]
    assert row.subtree_end.tolist() == [8, 8, 7, 7, 7, 6, 7, 8]
    assert row.predictor.tolist() == [1, 2, 4, 4, 1]
    assert row.targets.tolist() == [3, 7, 5, 6, 8]
    assert row.old_logprob is not None
    assert row.old_logprob.tolist() == row.rollout_logprob.tolist() == [-0.1, -0.2, -0.4, -0.5, -0.3]
    assert row.turn_offsets.tolist() == [0, 2, 3, 4, 5]
    assert row.weight_pos.tolist() == pytest.approx([0.125, 0.125, 1 / 6, 0, 0])
    assert row.weight_neg.tolist() == pytest.approx([0, 0, 0, 0.5, 0.25])
    assert row.weight_all.tolist() == pytest.approx([0.25, 0.25, 1 / 12, 1 / 6, 0.25])
    assert row.trajectory_count.tolist() == [3, 3, 1, 2, 1]
    assert row.path_offsets.tolist() == [0, 2, 4, 5]
    assert row.path_turns.tolist() == [0, 1, 0, 2, 3]
    assert row.path_weight_pos.tolist() == pytest.approx([0.5 / 12, 2 / 12, 2 * 0.5 / 12, 0, 0])
    assert row.path_weight_neg.tolist() == pytest.approx([0, 0, 0, 2 * 3 / 12, 0.25])
    assert row.leaf_multiplicity.tolist() == [1, 2, 1]
    assert (row.turn_index.tolist(), row.leaf_turn.tolist()) == ([1, 3, 4, 2], [3, 4, 2])
    assert (row.turn_tree.tolist(), row.leaf_tree.tolist()) == ([0] * 4, [0] * 3)
    assert (row.unique_tokens, row.flat_tokens) == (8, 6 + 2 * 6 + 3)


# Advantages per trajectory (c 1, d -1, b 2) do not cancel on a: W+(a) = 1/12, W-(a) = 2/12.
def test_signs_do_not_cancel() -> None:
    tree = forked()
    tree.leaf_advantages = np.array([np.nan, np.nan, 2.0, 1.0, -1.0])
    (row,) = pack_trees([tree], TURN, 8, dtype=DOUBLE)
    assert row.weight_pos.tolist() == pytest.approx([1 / 12, 1 / 12, 1 / 12, 0, 0.5])
    assert row.weight_neg.tolist() == pytest.approx([2 / 12, 2 / 12, 0, 2 / 12, 0])


# The first action token after turns without observation or without tokens: the nearest token above predicts it.
def test_predictor_over_empty_turns() -> None:
    tree = TurnTree([1])
    silent = tree.add_turn(tree.add_turn(0, [2]), [])
    tree.add_turn(silent, [3])
    tree.add_turn(tree.add_turn(0, []), [4])
    tree.advantages = np.ones(len(tree))
    (row,) = pack_trees([tree], TURN, 100)
    assert row.input_ids.tolist() == [1, 2, 3, 4]
    assert row.predictor.tolist() == [0, 1, 0]


@settings(max_examples=60, deadline=None)
@given(trees=forests(), slack=st.integers(0, 20))
def test_rows_are_the_trees(trees: list[TurnTree], slack: int) -> None:
    """Each query sees exactly its path, in order; each token and trajectory is owned once; predictors stand before."""
    longest = max(len(flat.ids) for flat in flatten(trees))
    rows = pack_trees(trees, KL, longest + slack)
    seen: list[tuple[int, int]] = []
    for row in rows:
        assert row.num_tokens <= longest + slack
        visible = visible_keys(row)
        for turn in range(row.num_turns):
            low, high = int(row.turn_offsets[turn]), int(row.turn_offsets[turn + 1])
            tree = trees[int(row.turn_tree[turn])]
            at = int(row.turn_index[turn])
            path = tree.path_ids(at)[: -len(tree.turns[at].observation_ids) or None]
            last = int(row.predictor[low]) + 1 if high - low > 1 else None
            query = int(row.predictor[high - 1])
            assert row.input_ids[visible[query]].tolist() == path[:-1].tolist()
            assert row.position_ids[visible[query]].tolist() == list(range(len(path) - 1))
            assert row.targets[low:high].tolist() == tree.turns[at].action_ids.tolist()
            if last is not None:
                assert (np.diff(row.predictor[low + 1 : high].numpy()) == 1).all()
        seen += list(zip(row.leaf_tree.tolist(), row.leaf_turn.tolist(), strict=True))
    assert sorted(seen) == [(t, leaf) for t, tree in enumerate(trees) for leaf in tree.leaves]
    assert sum(row.unique_tokens for row in rows) == sum(tree.unique_tokens for tree in trees)
    assert sum(row.flat_tokens for row in rows) == sum(tree.flat_tokens for tree in trees)
    counted = sum(float(row.trajectory_count.sum()) for row in rows)
    assert counted == sum(sum(flat.mask) for flat in flatten(trees))


# A root of 10 tokens with two branches a (10 tokens, leaves 5 and 5) and b (leaves 6 and 6); budget 32 of 42 tokens.
# Cutting between a and b repeats 10 tokens; after the first or third leaf it repeats 20 or 10, but the third fits too:
# root + a + 5 + 5 = 30, then root + b's leaves = 22. Fails when cuts are made greedily or ancestors repeat too often.
def test_cuts_where_least_is_repeated() -> None:
    tree = TurnTree(range(10))
    a = tree.add_turn(0, [1] * 4, None, [1] * 6)
    for parent, length in ((a, 5), (a, 5), (0, 6), (0, 6)):
        tree.add_turn(parent, [2] * length)
    tree.advantages = np.ones(len(tree))
    rows = pack_trees([tree], TURN, 32)
    assert sorted(row.num_tokens for row in rows) == [22, 30]
    assert sum(row.unique_tokens for row in rows) == 42
    repeated = next(row for row in rows if row.unique_tokens == 12)
    assert repeated.trajectory_count.tolist() == [1] * 12


# Fails when pieces are not put together: 3 trees of 4 tokens fit in two rows of 8.
def test_rows_are_filled() -> None:
    trees = []
    for _ in range(3):
        tree = TurnTree([1, 2])
        tree.add_turn(0, [3, 4])
        tree.advantages = np.ones(2)
        trees.append(tree)
    assert [row.num_tokens for row in pack_trees(trees, TURN, 8)] == [8, 4]
    assert [row.turn_tree.tolist() for row in pack_trees(trees, TURN, 8)] == [[0, 1], [2]]


# Only c has a gradient: a and its observation stay as ancestors, d and b go. With d's parent alone in need of a
# gradient, both children go and so does the observation that nobody reads.
def test_pruning_by_hand() -> None:
    tree = forked()
    tree.advantages = np.array([9.0, 0.0, 0.0, 2.0, 0.0])
    (row,) = pack_trees([tree], TURN, 8)
    assert row.input_ids.tolist() == [1, 2, 3, 7, 4, 5]
    assert row.weight_pos.tolist() == pytest.approx([0, 0, 2 / 12])  # B and |y| count the pruned ones
    assert pruned_tokens([tree], [row]) == 2
    tree.advantages = np.array([0.0, 1.0, 0.0, 0.0, 0.0])
    (row,) = pack_trees([tree], TURN, 8)
    assert row.input_ids.tolist() == [1, 2, 3, 7]
    assert row.weight_pos.tolist() == pytest.approx([0.25, 0.25])
    assert row.num_trajectories == 0


# At level sequence a ratio needs all of its trajectory, so a leaf with advantage 0 below a turn with one stays.
def test_pruning_keeps_whole_sequences() -> None:
    tree = forked()
    tree.advantages = np.array([0.0, 1.0, 0.0, 0.0, 0.0])
    (row,) = pack_trees([tree], TURN.with_(level="sequence"), 8)
    assert row.input_ids.tolist() == [1, 2, 3, 7, 4, 5, 6]


# Nothing is pruned when KL, entropy, local denominators or entropy statistics need every token, or when told not to.
@pytest.mark.parametrize(
    "overrides",
    [{"kl": "k1", "kl_coef": 0.1}, {"entropy_coef": 0.1}, {"denominator": "local"}, {"entropy_advantage": 0.2}],
    ids=lambda overrides: next(iter(overrides)),
)
def test_when_every_token_is_packed(overrides: dict[str, str]) -> None:
    tree = forked()
    tree.advantages = np.zeros(5)
    assert pack_trees([tree], TURN, 8) == []
    assert len(pack_trees([tree], TURN, 8, prune=False)) == 1
    assert pack_trees([tree], TURN.with_(**overrides), 8)[0].num_tokens == 8


# The mean over rows of each row's own mean. Fails when the global batch size or the number of rows is forgotten.
@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "token-mean", "turn-mean"])
@pytest.mark.parametrize("level", ["turn", "sequence"])
def test_local_denominator(aggregation: str, level: str) -> None:
    model, trees = ToyModel(VOCAB), special_forest()
    assign_credit(trees)
    objective = TURN.with_(denominator="local", aggregation=aggregation, level=level, clip_low=0.5, clip_high=0.5)
    rows = pack_trees(trees, objective, 33, dtype=DOUBLE)
    assert len(rows) > 2
    flat = torch.zeros((), dtype=DOUBLE)
    for row in rows:
        mine = []
        for t, leaf in zip(row.leaf_tree.tolist(), row.leaf_turn.tolist(), strict=True):
            position = sum(trees[t].turns[n].multiplicity for n in trees[t].leaves if n < leaf)
            mine += flatten([trees[t]])[position : position + trees[t].turns[leaf].multiplicity]
        flat = flat + flat_loss(model, mine, objective) / len(rows)
    assert_equal(packed_loss(model, rows, objective), flat, model)


def test_path_longer_than_a_row() -> None:
    with pytest.raises(ValueError, match=r"0 \('q'\).*turn 3 has 6 tokens \(2 of the prompt \+ 4.*train.row_tokens"):
        pack_trees([forked()], TURN, 5)


def test_action_without_predictor() -> None:
    tree = TurnTree([], question_id="no prompt")
    tree.add_turn(tree.add_turn(0, []), [1])
    tree.advantages = np.ones(3)
    with pytest.raises(ValueError, match=r"no prompt.*turn 2.*nothing predicts it"):
        pack_trees([tree], TURN, 8)


def test_credit_is_required() -> None:
    tree = forked()
    tree.advantages = None
    with pytest.raises(ValueError, match=r"'q'.*assign_credit"):
        pack_trees([tree], TURN, 8)
    tree.advantages = np.array([0.0, 0.0, 0.0, np.nan, 0.0])
    with pytest.raises(ValueError, match=r"'q'.*turn 3 is not finite"):
        pack_trees([tree], TURN, 8)


def test_nothing_to_pack() -> None:
    failed = TurnTree([1, 2])
    assign_credit([failed])
    assert pack_trees([], TURN, 8) == []
    assert pack_trees([failed], KL, 8) == []
    ranks = spread_rows([], 2)
    assert [len(rank) for rank in ranks] == [1, 1]


# Rows do not share memory with each other, the trees or their own other fields: fields may be changed in place.
def test_rows_own_their_memory() -> None:
    tree = forked()
    rows = pack_trees([tree], TURN, 6, dtype=DOUBLE)
    tensors = [getattr(row, f.name) for row in rows for f in fields(row) if isinstance(getattr(row, f.name), Tensor)]
    before = [t.clone() for t in tensors]
    for i, tensor in enumerate(tensors):
        tensor += 1
        assert all(torch.equal(t, b) for t, b in zip(tensors[i + 1 :], before[i + 1 :], strict=True))
    assert tree.turns[1].logprobs.tolist() == [-0.1, -0.2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    for row in [*pack_trees([forked()], TURN, 8, dtype=dtype), empty_row(dtype)]:
        for f in fields(PackedTrees):
            value = getattr(row, f.name)
            if f.name in ("input_ids", "position_ids", "predictor", "targets"):
                assert value.dtype == torch.int64, f.name
            elif isinstance(value, Tensor):
                assert value.dtype in (torch.int32, dtype), f.name
                assert (value.dtype == torch.int32) == (getattr(empty_row(), f.name).dtype == torch.int32), f.name


# Costs: 8 tokens see 1 + 2 + 3 + 4 + 5 + 6 + 6 + 3 = 30 keys.
def test_row_cost() -> None:
    (row,) = pack_trees([forked()], TURN, 8)
    assert row_cost(row, pairs_per_token=100.0) == 8 * 100 + 30


# Five chains of 12, 10, 8, 6 and 4 tokens on two ranks: steps (12, 10), (8, 6), (4, empty); within a step the longer
# row goes to the rank with less behind it: 10 + 8 tokens see fewer pairs than 12 + 6. Fails when the counts differ or
# the loads drift apart.
def test_spread_rows() -> None:
    trees = []
    for length in (4, 12, 6, 10, 8):
        tree = TurnTree([1])
        tree.add_turn(0, [2] * (length - 1))
        tree.advantages = np.ones(2)
        trees.append(tree)
    rows = [pack_trees([tree], TURN, 12)[0] for tree in trees]
    assert [row.num_tokens for row in spread_rows(rows, 1)[0]] == [12, 10, 8, 6, 4]
    ranks = spread_rows(rows, 2)
    assert [[row.num_tokens for row in rank] for rank in ranks] == [[12, 6, 2], [10, 8, 4]]
    assert ranks[0][2].weight_all.tolist() == [0.0]
    with pytest.raises(ValueError, match="ranks=0"):
        spread_rows([], 0)


def test_entropy_advantage_is_for_token_weights() -> None:
    rows = pack_trees([forked()], TURN, 8)
    assert apply_entropy_advantage(rows, [torch.zeros(5)], TURN) == rows
    with pytest.raises(ValueError, match=r"entropy_advantage=0\.2 .* level='sequence'"):
        TURN.with_(level="sequence", entropy_advantage=0.2)


def returning(results: Iterator[Tensor]) -> Callable[[Tensor], Tensor]:
    """An all-reduce that gives one result after another."""
    return lambda _: next(results)


# Two ranks with one row each give what one rank with both rows gives. Fails when statistics are per rank.
def test_clip_scale_widens_and_narrows_the_ranges_of_turns() -> None:
    """Fails if the scale of a turn is lost, replaces the objective's range, or is another turn's."""
    scaled = forked()
    scaled.clip_scale = 1 + 0.1 * np.arange(len(scaled), dtype=np.float64)
    (row,) = pack_trees([scaled], TURN, 64)
    assert row.clip_low is not None and row.clip_high is not None
    scale = 1 + 0.1 * row.turn_index.double()
    torch.testing.assert_close(row.clip_low.double(), 3e-3 * scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(row.clip_high.double(), 4e-3 * scale, rtol=1e-6, atol=0)
    (plain,) = pack_trees([forked()], TURN, 64)
    assert plain.clip_low is None and plain.clip_high is None


def test_entropy_statistics_over_ranks() -> None:
    objective = Objective.preset("aepo")
    rows = pack_trees([forked(), forked()], objective, 8, dtype=DOUBLE)
    entropies = [torch.arange(5.0, dtype=DOUBLE), torch.arange(5.0, dtype=DOUBLE) ** 2]
    together = apply_entropy_advantage(rows, entropies, objective)
    counts = [row.trajectory_count for row in rows]
    tokens: Any = sum(c.sum() for c in counts)
    total: Any = sum((c * h).sum() for c, h in zip(counts, entropies, strict=True))
    squares: Any = sum((c * (h - total / tokens) ** 2).sum() for c, h in zip(counts, entropies, strict=True))
    for row, entropy, expected in zip(rows, entropies, together, strict=True):
        over_ranks = iter([torch.stack([tokens, total]), squares[None]])  # what an all-reduce over both ranks returns
        (alone,) = apply_entropy_advantage([row], [entropy], objective, all_reduce=returning(over_ranks))
        assert torch.allclose(alone.weight_pos, expected.weight_pos, rtol=1e-12)
        assert torch.allclose(alone.weight_neg, expected.weight_neg, rtol=1e-12)
