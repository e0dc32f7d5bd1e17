"""The forests and rows of the benches."""

from __future__ import annotations

import numpy as np
import torch

from atpo_fast import assign_credit
from atpo_fast.tree import overlap
from bench.packing.forests import PUBLISHED, SEARCH_3000, forest_of_overlap, random_forest, random_tree, tree_of_tokens
from bench.packing.rows import every_position, flat_rows, sequence_ends, visible_pairs
from tests.helpers.tree_cases import random_row, tree_mask

VOCAB, SCALE, MAX_TOKENS = 512, 40, 512


def test_forests_are_those_of_the_published_search() -> None:
    """Fails if trees are of another size, share or number of leaves than the published search's, or a synthetic forest
    misses its overlap."""
    trees = [random_tree(seed, PUBLISHED, VOCAB) for seed in range(10)]
    assert all(len(tree.leaves) == 22 and 17_000 <= tree.unique_tokens <= 65_000 for tree in trees)
    assert all(0.34 <= overlap([tree]) <= 0.56 for tree in trees)
    for target in (0, 0.36, 0.8, 0.9):
        assert abs(overlap(forest_of_overlap(target, 1, 8, VOCAB)) - target) < 0.02
    tree = random_tree(0, SEARCH_3000, VOCAB)
    assert [len(tree.path_ids(leaf)) for leaf in tree.leaves] == [3000] * 22


def test_visible_pairs_are_those_of_the_mask() -> None:
    """Fails if rates and bounds count other pairs than the attention computes."""
    for seed in range(5):
        end = random_row(100, 9, seed)
        assert visible_pairs(end) == int(tree_mask(end).sum())
        assert visible_pairs(end, 9) == int(tree_mask(end, window=9).sum())


def test_head_on_every_position_of_a_flat_row() -> None:
    """Fails if a position is left out or scored twice, its target is not its next token, or a turn is cut."""
    for row in flat_rows(random_forest(1, PUBLISHED.scaled(SCALE), VOCAB), MAX_TOKENS):
        full = every_position(row)
        ends = sequence_ends(row.subtree_end)
        positions = full.predictor.tolist()
        assert positions == [t for t in range(row.num_tokens) if t + 1 not in ends]
        assert torch.equal(full.targets, row.input_ids[full.predictor + 1])
        assert bool((full.weight_pos + full.weight_neg > 0).all())
        torch.testing.assert_close(full.weight_neg.sum(), row.weight_neg.sum())
        first = row.predictor[row.turn_offsets[:-1].long()].tolist()
        turns = [positions[lo] for lo in full.turn_offsets[:-1].tolist()]
        own = set(row.predictor.tolist())
        length = dict(zip(turns, full.turn_offsets.diff().tolist(), strict=True))
        assert [length[start] for start in first] == row.turn_offsets.diff().tolist()
        assert not (set(turns) - set(first)) & own
        assert full.turn_offsets[-1] == len(positions) and int(full.turn_offsets.diff().min()) > 0


def test_credit_of_a_scaled_tree() -> None:
    """Fails if a tree made for a row of attention does not fit it, or has fewer leaves."""
    tree = tree_of_tokens(2048, VOCAB)
    assert 0.97 * 2048 < tree.unique_tokens <= 2048 and len(tree.leaves) == 22
    before = np.array(tree.advantages)
    assign_credit([tree])
    np.testing.assert_array_equal(tree.advantages, before)
