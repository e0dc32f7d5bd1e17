"""The flat table of all turns of a list of trees, on which credit and packing work.

`N` turns of all trees in the order of (tree, turn index), `S` trajectories, `P` entries of the path table, `F` action
tokens of the forest in the order of turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from atpo_fast.tree.turn_tree import TurnTree, mean_nll

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(slots=True, kw_only=True)
class Forest:
    """Structure and tokens of the turns; the derived arrays follow from the given ones."""

    names: list[str]  # a name per tree, for error messages
    trees: Sequence[TurnTree] = ()  # the trees that the table was read from; none for a flat batch
    tree: Ints  # (N,) tree of each turn
    index: Ints  # (N,) index of the turn in its tree
    parent: Ints  # (N,) index in this table, smaller than the turn's own; -1 for roots
    actions: list[Ints]  # N arrays of action token ids
    observations: list[Ints]  # N arrays of observation token ids
    rollout_logprobs: list[Floats]  # N arrays, one entry per action token
    old_logprobs: list[Floats]  # N arrays, one entry per action token
    leaves: Ints  # (S,) turn at which each trajectory ends, ascending
    multiplicity: Floats  # (S,) number of times that each trajectory counts

    action_length: Ints = field(init=False)  # (N,)
    observation_length: Ints = field(init=False)  # (N,)
    action_offsets: Ints = field(init=False)  # (N+1,) CSR over the F axis
    depth: Ints = field(init=False)  # (N,) turns above
    levels: list[Ints] = field(init=False)  # turns by depth; the first are the roots
    prefix_length: Ints = field(init=False)  # (N,) tokens on the path before the turn
    order: Ints = field(init=False)  # (N,) rank in depth-first pre-order; trees follow one another
    subtree_size: Ints = field(init=False)  # (N,) turns in the subtree, itself included
    path_offsets: Ints = field(init=False)  # (S+1,) CSR: the turns with action tokens of each trajectory
    path_turns: Ints = field(init=False)  # (P,) root side first

    def __post_init__(self) -> None:
        count = len(self.parent)
        self.action_length = np.fromiter(map(len, self.actions), dtype=np.int64, count=count)
        self.observation_length = np.fromiter(map(len, self.observations), dtype=np.int64, count=count)
        self.action_offsets = offsets(self.action_length)
        self.depth = _depths(self.parent)
        self.levels = _levels(self.depth)
        length = self.action_length + self.observation_length
        self.prefix_length = np.zeros(count, dtype=np.int64)
        for level in self.levels[1:]:
            above = self.parent[level]
            self.prefix_length[level] = self.prefix_length[above] + length[above]
        self.subtree_size = self.sum_up(np.ones(count, dtype=np.int64))
        self.order = self._pre_order()
        self.path_offsets, self.path_turns = self._paths()

    def part(self, first: int, last: int) -> Forest:
        """Cut out the trees `first` to `last - 1`, which become trees 0, 1, ...; nothing is read or derived again."""
        low, high = np.searchsorted(self.tree, [first, last]).tolist()
        leaf_low, leaf_high = np.searchsorted(self.leaves, [low, high]).tolist()
        path_low, path_high = self.path_offsets[[leaf_low, leaf_high]].tolist()
        part = copy(self)
        part.names, part.trees = self.names[first:last], self.trees[first:last]
        for name in _TURN_FIELDS:
            setattr(part, name, getattr(self, name)[low:high])
        part.tree = part.tree - first
        part.parent = np.where(part.parent < 0, -1, part.parent - low)
        part.order = part.order - low
        part.levels = _levels(part.depth)
        part.action_offsets = self.action_offsets[low : high + 1] - self.action_offsets[low]
        part.leaves, part.multiplicity = self.leaves[leaf_low:leaf_high] - low, self.multiplicity[leaf_low:leaf_high]
        part.path_offsets = self.path_offsets[leaf_low : leaf_high + 1] - path_low
        part.path_turns = self.path_turns[path_low:path_high] - low
        return part

    def sum_up(self, values: NDArray) -> NDArray:
        """Sum (N,) `values` over each turn's subtree, the turn itself included: (N,)."""
        total = values.copy()
        for level in self.levels[:0:-1]:
            np.add.at(total, self.parent[level], total[level])
        return total

    def sum_children(self, values: Floats) -> Floats:
        """Sum (N,) `values` over the children of each turn: (N,)."""
        inner = self.parent >= 0
        return group_sum(self.parent[inner], values[inner], len(self.parent))

    def sum_leaves_below(self, values: Floats) -> Floats:
        """Sum (S,) `values` over the trajectories that pass through each turn: (N,)."""
        return self.sum_up(group_sum(self.leaves, values, len(self.parent)))

    @property
    def tree_offsets(self) -> Ints:
        """First turn of each tree, which is its root, (trees+1,)."""
        return offsets(np.bincount(self.tree, minlength=len(self.names)))

    @property
    def nll(self) -> Floats:
        """Mean negative log-prob of each turn's action, (N,): the entropy estimate H(n); 0 for an empty action."""
        return np.fromiter(map(mean_nll, self.rollout_logprobs), dtype=np.float64, count=len(self.parent))

    @property
    def path_leaf(self) -> Ints:
        """Trajectory of each entry of the path table, (P,)."""
        return np.repeat(np.arange(len(self.leaves)), np.diff(self.path_offsets))

    def _pre_order(self) -> Ints:
        """Rank the turns, (N,): the parent's rank + 1 + the turns below earlier siblings."""
        siblings = np.argsort(self.parent, kind="stable")
        before = np.cumsum(self.subtree_size[siblings]) - self.subtree_size[siblings]
        group_start = np.searchsorted(self.parent[siblings], self.parent[siblings], side="left")
        rank = np.empty(len(self.parent), dtype=np.int64)
        rank[siblings] = before - before[group_start] if len(before) else before
        for level in self.levels[1:]:
            rank[level] += rank[self.parent[level]] + 1
        return rank

    def _paths(self) -> tuple[Ints, Ints]:
        """Climb from all leaves at once and return the path table: (S+1,) offsets, (P,) turns."""
        trajectory, turn = np.arange(len(self.leaves)), self.leaves
        found_trajectory, found_turn = [], []
        while turn.size:
            has_action = self.action_length[turn] > 0
            found_trajectory.append(trajectory[has_action])
            found_turn.append(turn[has_action])
            turn = self.parent[turn]
            trajectory, turn = trajectory[turn >= 0], turn[turn >= 0]
        if not found_turn:
            return np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)
        all_trajectories, all_turns = np.concatenate(found_trajectory), np.concatenate(found_turn)
        by_path = np.lexsort((self.depth[all_turns], all_trajectories))
        counts = np.bincount(all_trajectories, minlength=len(self.leaves))
        return offsets(counts), all_turns[by_path]


_TURN_FIELDS = (
    *("tree", "index", "parent", "actions", "observations", "rollout_logprobs", "old_logprobs"),
    *("action_length", "observation_length", "depth", "prefix_length", "order", "subtree_size"),
)


def as_forest(trees: Sequence[TurnTree] | Forest) -> Forest:
    """Read trees into a table; return a table unchanged."""
    return trees if isinstance(trees, Forest) else forest_of_trees(trees)


def forest_of_trees(trees: Sequence[TurnTree]) -> Forest:
    """Read the trees' turns, whose number and tokens must not change afterwards; the trajectories are their leaves.

    Rewards and advantages are not part of the table: `assign_credit` and `pack_trees` read them from the trees.
    """
    starts = offsets(np.array([len(tree) for tree in trees], dtype=np.int64))
    turns = [turn for tree in trees for turn in tree.turns]
    sizes = np.diff(starts)
    local_parent = np.fromiter((turn.parent for turn in turns), dtype=np.int64, count=len(turns))
    parent = np.where(local_parent < 0, -1, local_parent + np.repeat(starts[:-1], sizes))
    childless = np.bincount(parent[parent >= 0], minlength=len(turns)) == 0
    leaves = np.flatnonzero(childless & (parent >= 0))
    logprobs = [turn.logprobs for turn in turns]
    return Forest(
        names=[f"{t} ({tree.question_id!r})" for t, tree in enumerate(trees)],
        trees=trees,
        tree=np.repeat(np.arange(len(trees)), sizes),
        index=ranges(np.zeros(len(trees), dtype=np.int64), sizes),
        parent=parent,
        actions=[turn.action_ids for turn in turns],
        observations=[turn.observation_ids for turn in turns],
        rollout_logprobs=logprobs,
        old_logprobs=logprobs,
        leaves=leaves,
        multiplicity=np.array([turns[n].multiplicity for n in leaves.tolist()], dtype=np.float64),
    )


def group_sum(group: Ints, values: NDArray, size: int = 0) -> Floats:
    """Sum `values` by group number: (size,), or as many as there are groups if that is more."""
    return np.bincount(group, weights=values, minlength=size).astype(np.float64)


def offsets(counts: Ints | Bools) -> Ints:
    """Turn (n,) counts into their (n+1,) CSR offsets."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """List the integers of `[start, start + length)` of every pair, one range after another."""
    first = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - first, lengths)


def _depths(parent: Ints) -> Ints:
    depth: list[int] = []
    for above in parent.tolist():
        depth.append(depth[above] + 1 if above >= 0 else 0)
    return np.array(depth, dtype=np.int64)


def _levels(depth: Ints) -> list[Ints]:
    """Split the turns by their (N,) depth, each level in ascending order."""
    by_depth = np.argsort(depth, kind="stable")
    return np.split(by_depth, np.cumsum(np.bincount(depth))[:-1]) if len(depth) else []
