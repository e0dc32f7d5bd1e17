"""From the rewards of leaves to the advantages of turns: the entry point of credit assignment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np

from atpo_fast.common.choices import CreditMethod, TurnAdvantage, TurnValue
from atpo_fast.credit import trajectory_credit
from atpo_fast.credit.trajectory_credit import Leaves
from atpo_fast.credit.turn_credit import turn_advantages, turn_values
from atpo_fast.tree import Forest, TurnTree, as_forest
from atpo_fast.tree.forest import Floats, Ints, group_sum

METHODS: tuple[str, ...] = get_args(CreditMethod)
VALUES: tuple[str, ...] = get_args(TurnValue)
ADVANTAGES: tuple[str, ...] = get_args(TurnAdvantage)


def assign_credit(
    trees: Sequence[TurnTree] | Forest,
    method: str = "at2po",
    *,
    leaf_norm: bool = True,
    value: str = "child_softmax",
    advantage: str = "node_value",
    k: int = 4,
) -> None:
    """Turn leaf rewards into advantages, in place (docs/design.md#credit).

    Fills `tree.values` and `tree.advantages`, one float per turn. The methods other than `at2po` give each trajectory
    one advantage: they also fill `tree.leaf_advantages` (N,), nan except on leaves, and `tree.advantages` is then the
    mean of the leaf advantages below a turn, for display. A leaf counts as often as its multiplicity. Trees with the
    same non-empty `question_id` form one question; all trees given form the batch of `reinforce++`. A tree without
    leaves gets zeros.

    Args:
        trees: trees with a reward on every leaf, or their table (`as_forest`), which packing can use again.
        method: one of `METHODS`.
        leaf_norm: at2po: standardise rewards within the tree first.
        value: at2po: one of `VALUES`, `child_softmax`, `child_mean` or `leaf_mean`.
        advantage: at2po: `node_value`, `diff_parent`, `diff_global` or `diff_localglobal`.
        k: passk: size of the set whose best counts.

    Raises:
        ValueError: an unknown choice, k < 1, or a leaf without a reward (tree and turn are named).
    """
    _check_choices(method, value, advantage, k)
    forest = as_forest(trees)
    if not forest.trees:
        return
    reward = _rewards(forest)
    if method == "at2po":
        values = turn_values(forest, reward, leaf_norm=leaf_norm, value=value)
        _store(forest, values, turn_advantages(forest, values, advantage=advantage), None)
        return
    of_leaf = _trajectory_advantages(forest, reward, method, k)
    count = np.maximum(forest.sum_leaves_below(forest.multiplicity), 1.0)
    per_leaf = np.full(len(forest.parent), np.nan)
    per_leaf[forest.leaves] = of_leaf
    values = forest.sum_leaves_below(forest.multiplicity * reward) / count
    _store(forest, values, forest.sum_leaves_below(forest.multiplicity * of_leaf) / count, per_leaf)


def _check_choices(method: str, value: str, advantage: str, k: int) -> None:
    choices = (("method", method, METHODS), ("value", value, VALUES), ("advantage", advantage, ADVANTAGES))
    for name, given, allowed in choices:
        if given not in allowed:
            raise ValueError(f"assign_credit: {name}={given!r} must be one of {', '.join(allowed)}")
    if k < 1:
        raise ValueError(f"assign_credit: k={k} must be at least 1")


def _rewards(forest: Forest) -> Floats:
    """Read the leaves' rewards, (S,). Raises ValueError, naming tree and turn, where one is missing or not finite."""
    trees, turns = forest.tree[forest.leaves].tolist(), forest.index[forest.leaves].tolist()
    return np.array([_reward(forest.trees[t], n) for t, n in zip(trees, turns, strict=True)], dtype=np.float64)


def _reward(tree: TurnTree, leaf: int) -> float:
    reward = tree.turns[leaf].reward
    if reward is None or not np.isfinite(reward):
        raise ValueError(
            f"tree {tree.question_id!r}: leaf turn {leaf} has reward {reward}; "
            "call tree.set_reward(turn, reward) with a finite number on every leaf before assign_credit"
        )
    return reward


def _trajectory_advantages(forest: Forest, reward: Floats, method: str, k: int) -> Floats:
    """Compute one advantage per leaf, (S,), by a method of trajectories."""
    tree = forest.tree[forest.leaves]
    tokens = group_sum(forest.path_leaf, forest.action_length[forest.path_turns], len(forest.leaves))
    leaves = Leaves(reward, forest.multiplicity, tree, _question_numbers(forest.trees)[tree], tokens)
    methods: dict[str, Callable[[Leaves], Floats]] = {
        "grpo": trajectory_credit.grpo,
        "tree_grpo": trajectory_credit.tree_grpo,
        "rloo": trajectory_credit.rloo,
        "reinforce++": trajectory_credit.reinforce_plus_plus,
        "passk": lambda leaves: trajectory_credit.pass_at_k(leaves, k),
    }
    return methods[method](leaves)


def _question_numbers(trees: Sequence[TurnTree]) -> Ints:
    """Return the number of each tree's question, (trees,). Trees without a question_id share theirs with no other."""
    first: dict[str, int] = {}
    numbers = [first.setdefault(tree.question_id, t) if tree.question_id else t for t, tree in enumerate(trees)]
    return np.array(numbers, dtype=np.int64)


def _store(forest: Forest, values: Floats, advantages: Floats, per_leaf: Floats | None) -> None:
    """Write (N,) arrays of the forest to its trees."""
    bounds = forest.tree_offsets.tolist()
    for tree, start, end in zip(forest.trees, bounds[:-1], bounds[1:], strict=True):
        tree.values = values[start:end].copy()
        tree.advantages = advantages[start:end].copy()
        tree.leaf_advantages = None if per_leaf is None else per_leaf[start:end].copy()
