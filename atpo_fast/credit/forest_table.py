"""What credit assignment reads of a batch of trees, as arrays over all their turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atpo_fast.credit.standardize import Floats, group_sum
from atpo_fast.tree import TurnTree

Ints = NDArray[np.int64]


@dataclass(slots=True)
class ForestTable:
    """Turns of all trees one after another (N), leaves of all trees one after another (S)."""

    offsets: Ints  # (trees + 1,) first turn of each tree
    parent: Ints  # (N,) index in this table, -1 for roots
    levels: list[Ints]  # turns by depth; levels[0] are the roots
    nll: Floats  # (N,) entropy estimate of a turn
    leaves: Ints  # (S,) turns that are leaves
    leaf_tree: Ints  # (S,) index of the leaf's tree
    leaf_question: Ints  # (S,) trees with the same question_id share a number; trees without an id stand alone
    multiplicity: Floats  # (S,)
    reward: Floats  # (S,)

    def sum_children(self, values: Floats) -> Floats:
        """(N,) sum over the children of every turn of (N,) `values`."""
        inner = self.parent >= 0
        return group_sum(self.parent[inner], values[inner], len(self.parent))

    def sum_leaves_below(self, leaf_values: Floats) -> Floats:
        """(N,) sum over the leaves in each turn's subtree of (S,) `leaf_values`."""
        total = np.zeros(len(self.parent))
        total[self.leaves] = leaf_values
        for level in self.levels[:0:-1]:
            np.add.at(total, self.parent[level], total[level])
        return total


def forest_table(trees: Sequence[TurnTree]) -> ForestTable:
    """Read the trees. Raises ValueError, naming tree and turn, for a leaf without a finite reward."""
    offsets = np.concatenate([[0], np.cumsum([len(tree) for tree in trees])]).astype(np.int64)
    parent: list[int] = []
    depth: list[int] = []
    for start, tree in zip(offsets[:-1].tolist(), trees, strict=True):
        for turn in tree.turns:
            parent.append(turn.parent + start if turn.parent >= 0 else -1)
            depth.append(depth[parent[-1]] + 1 if turn.parent >= 0 else 0)
    leaves = [(t, n) for t, tree in enumerate(trees) for n in tree.leaves]
    leaf_index = np.array([offsets[t] + n for t, n in leaves], dtype=np.int64)
    multiplicity = np.array([trees[t].turns[n].multiplicity for t, n in leaves], dtype=np.float64)
    nll = np.array([turn.nll for tree in trees for turn in tree.turns], dtype=np.float64)
    leaf_tree = np.array([t for t, _ in leaves], dtype=np.int64)
    return ForestTable(
        offsets=offsets,
        parent=np.array(parent, dtype=np.int64),
        levels=_levels(np.array(depth, dtype=np.int64)),
        nll=nll,
        leaves=leaf_index,
        leaf_tree=leaf_tree,
        leaf_question=_question_numbers(trees)[leaf_tree],
        multiplicity=multiplicity,
        reward=np.array([_reward(trees[t], n) for t, n in leaves], dtype=np.float64),
    )


def _levels(depth: Ints) -> list[Ints]:
    if not depth.size:
        return []
    order = np.argsort(depth, kind="stable")
    return np.split(order, np.cumsum(np.bincount(depth))[:-1])


def _question_numbers(trees: Sequence[TurnTree]) -> Ints:
    first: dict[str, int] = {}
    numbers = [first.setdefault(tree.question_id, t) if tree.question_id else t for t, tree in enumerate(trees)]
    return np.array(numbers, dtype=np.int64)


def _reward(tree: TurnTree, leaf: int) -> float:
    reward = tree.turns[leaf].reward
    if reward is None or not np.isfinite(reward):
        raise ValueError(
            f"tree {tree.question_id!r}: leaf turn {leaf} has reward {reward}; "
            "call tree.set_reward(turn, reward) with a finite number on every leaf before assign_credit"
        )
    return reward
