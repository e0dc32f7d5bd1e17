"""Trees cut depth-first, against pieces that were worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from atpo_fast import TurnTree
from atpo_fast.packing.depth_first import DepthFirst, cut_depth_first
from atpo_fast.tree import as_forest

BUDGET = 10


def cut(parents: list[int], length: list[int], left_out: tuple[int, ...] = ()) -> DepthFirst:
    """Cut a tree of turns with these parents and numbers of tokens; some turns are not packed."""
    tree = TurnTree([1] * length[0])
    for parent in parents[1:]:
        tree.add_turn(parent, [1], [0.0])
    kept = np.ones(len(parents), dtype=bool)
    kept[list(left_out)] = False
    return cut_depth_first(as_forest([tree]), kept, np.array(length), 0, BUDGET)


def listed(plan: DepthFirst) -> list[tuple[list[int], int, int, bool]]:
    """Turns, depth, prefix and whether opened, of every piece."""
    return [(piece.turns.tolist(), piece.depth, piece.prefix_tokens, piece.opened) for piece in plan.pieces]


def test_pieces_of_a_tree() -> None:
    """Fails if a subtree that fits exactly is opened, siblings share a row that is too short for them, or a row sees
    another prefix than the opened turns above it."""
    plan = cut([-1, 0, 1, 1, 0, 4, 0, 0], [4, 3, 5, 4, 6, 5, 10, 3])
    assert listed(plan) == [
        ([0], 0, 0, True),
        ([6], 1, 4, False),  # fills a row exactly
        ([7], 1, 4, False),
        ([1], 1, 4, True),
        ([2, 3], 2, 7, False),
        ([4], 1, 4, True),
        ([5], 2, 10, False),
    ]
    assert (plan.longest_row, plan.longest_prefix) == (10, 10)
    assert plan.cost == pytest.approx((4 + 3 + 6) / 3 + 1024 * (7 + 3))  # opened rows run twice


def test_a_chain_is_opened_in_one_row() -> None:
    """Fails if two turns that exactly fill a row are opened one by one, or a third is added that does not fit."""
    assert listed(cut([-1, 0, 1, 1], [6, 4, 8, 8])) == [
        ([0, 1], 0, 0, True), ([2], 1, 10, False), ([3], 1, 10, False),
    ]  # fmt: skip
    assert listed(cut([-1, 0, 1, 1], [6, 5, 8, 8]))[:2] == [([0], 0, 0, True), ([1], 1, 6, True)]


def test_turns_without_tokens_and_turns_that_are_left_out() -> None:
    """Fails if an empty turn makes a row of its own, or what is not packed comes into a row."""
    assert listed(cut([-1, 0, 0], [0, 8, 8])) == [([1], 0, 0, False), ([2], 0, 0, False)]
    assert listed(cut([-1, 0, 0, 1], [4, 3, 9, 0], left_out=(3,))) == [
        ([0], 0, 0, True), ([1], 1, 4, False), ([2], 1, 4, False),
    ]  # fmt: skip


def test_a_turn_longer_than_a_row() -> None:
    """Fails if such a turn is split, lost, or opened for nothing."""
    plan = cut([-1, 0], [15, 0], left_out=(1,))
    assert listed(plan) == [([0], 0, 0, False)]
    assert (plan.longest_row, plan.longest_prefix, plan.cost) == (15, 0, 1024)
