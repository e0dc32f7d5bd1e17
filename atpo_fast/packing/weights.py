"""Weights of the de-duplicated loss (docs/design.md#deduplication).

The weight of an action token t of trajectory l is `scale[l] * share[t]`: `scale` depends on the trajectory and on the
denominators, `share` is 1 but for `turn-mean` and for turns with a `turn_weight`. Such a turn counts with that part of
its tokens, and as that part of a turn, in each trajectory and in the denominators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from atpo_fast.objective import Objective
from atpo_fast.tree.forest import Bools, Floats, Forest, Ints, group_sum


@dataclass(slots=True)
class ForestWeights:
    """Weights of the action tokens (F) and of the path table (P) of a forest."""

    pos: Floats  # (F,) W+
    neg: Floats  # (F,) W-
    all: Floats  # (F,) W0
    count: Floats  # (F,) trajectories through the token
    path_pos: Floats  # (P,) per-token weight of one trajectory in one turn, multiplicity included
    path_neg: Floats  # (P,)


Weigh = Callable[[Ints | None], ForestWeights]
"""Computes the weights, given the row of each trajectory, (S,); None puts the denominators over everything."""


def trajectory_scale(
    objective: Objective,  # its aggregation and max_length
    tokens: Floats,  # (S,) action tokens of each trajectory
    turns: Floats,  # (S,) turns with action tokens of each trajectory
    multiplicity: Floats,  # (S,)
    row: Ints | None,  # (S,) row of each trajectory; None: one global mean
) -> Floats:
    """Compute the factor of each trajectory's token weights, (S,), by `objective.aggregation`."""
    group = np.zeros(len(tokens), dtype=np.int64) if row is None else row
    rows = int(group.max(initial=0)) + 1
    if objective.aggregation == "token-mean":
        total = group_sum(group, multiplicity * tokens, rows)[group]
        return 1.0 / _or_one(total * rows)
    trajectories = group_sum(group, multiplicity, rows)[group] * rows
    per_trajectory = {
        "seq-mean-token-mean": _or_one(tokens),
        "seq-mean-token-sum": np.ones_like(tokens),
        "seq-mean-token-sum-norm": np.full_like(tokens, objective.max_length),
        "turn-mean": _or_one(turns),
    }
    return 1.0 / (trajectories * per_trajectory[objective.aggregation])


def _or_one(count: Floats) -> Floats:
    """Return counts, which may be fractions, with 1 where nothing was counted."""
    return np.where(count > 0, count, 1.0)


def tree_weights(forest: Forest, objective: Objective) -> Weigh:
    """Weigh the forest's trees by their credit: `leaf_advantages` where set, else `advantages`.

    Raises ValueError for a tree without credit or with an advantage that is not finite.
    """
    advantage, leaf_advantage, per_leaf = _advantages(forest)
    path_leaf, path_turns = forest.path_leaf, forest.path_turns
    share = np.concatenate([np.ones(len(t)) if t.turn_weight is None else t.turn_weight for t in forest.trees])
    tokens = group_sum(path_leaf, (share * forest.action_length)[path_turns], len(forest.leaves))
    turns = group_sum(path_leaf, share[path_turns], len(forest.leaves))
    if objective.aggregation == "turn-mean":
        share /= np.maximum(forest.action_length, 1)
    count = forest.sum_leaves_below(forest.multiplicity)
    path_advantage = np.where(per_leaf[path_turns], leaf_advantage[path_leaf], advantage[path_turns])

    def weigh(row: Ints | None) -> ForestWeights:
        base = forest.multiplicity * trajectory_scale(objective, tokens, turns, forest.multiplicity, row)
        below = forest.sum_leaves_below(base)

        def signed(sign: float) -> Floats:
            of_leaves = forest.sum_leaves_below(base * np.maximum(sign * leaf_advantage, 0.0))
            return share * np.where(per_leaf, of_leaves, below * np.maximum(sign * advantage, 0.0))

        path_base = base[path_leaf] * share[path_turns]
        per_turn = (signed(1.0), signed(-1.0), share * below, count)
        pos, neg, every, trajectories = (np.repeat(values, forest.action_length) for values in per_turn)
        return ForestWeights(
            pos=pos,
            neg=neg,
            all=every,
            count=trajectories,
            path_pos=path_base * np.maximum(path_advantage, 0.0),
            path_neg=path_base * np.maximum(-path_advantage, 0.0),
        )

    return weigh


def _advantages(forest: Forest) -> tuple[Floats, Floats, Bools]:
    """Read (N,) advantages of turns, (S,) of leaves (0 where credit is per turn), and (N,) where credit is per leaf."""
    trees = forest.trees
    for tree, name in zip(trees, forest.names, strict=True):
        if tree.advantages is None or len(tree.advantages) != len(tree):
            raise ValueError(f"tree {name} has no advantages for its {len(tree)} turns: call assign_credit first")
    advantage = np.concatenate([np.zeros(0), *(tree.advantages for tree in trees)])  # type: ignore[list-item]
    per_tree = np.array([tree.leaf_advantages is not None for tree in trees], dtype=bool)
    leaf_values = [np.zeros(len(t)) if t.leaf_advantages is None else t.leaf_advantages for t in trees]
    leaf_advantage = np.concatenate([np.zeros(0), *leaf_values])[forest.leaves]
    for values, at in ((advantage, np.arange(len(advantage))), (leaf_advantage, forest.leaves)):
        bad = at[~np.isfinite(values)]
        if bad.size:
            turn = int(bad[0])
            name = forest.names[forest.tree[turn]]
            raise ValueError(f"tree {name}: the advantage of turn {forest.index[turn]} is not finite")
    return advantage, leaf_advantage, per_tree[forest.tree]
