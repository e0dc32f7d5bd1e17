"""The entry point of credit assignment."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from atpo_fast.credit import trajectory_credit
from atpo_fast.credit.forest_table import Floats, ForestTable, forest_table
from atpo_fast.credit.turn_credit import ADVANTAGES, VALUES, turn_advantages, turn_values
from atpo_fast.tree import TurnTree

METHODS = ("at2po", "grpo", "tree_grpo", "rloo", "reinforce++", "passk")


def assign_credit(
    trees: Sequence[TurnTree],
    method: str = "at2po",
    *,
    leaf_norm: bool = True,
    value: str = "child_softmax",
    advantage: str = "node_value",
    k: int = 4,
) -> None:
    """Turn leaf rewards into advantages, in place (design, section 3).

    Fills `tree.values` and `tree.advantages`, one float per turn. The methods other than `at2po` give each trajectory
    one advantage: they also fill `tree.leaf_advantages` (N,), nan except on leaves, and `tree.advantages` is then the
    mean of the leaf advantages below a turn, for display. A leaf counts as often as its multiplicity. Trees with the
    same non-empty `question_id` form one question; all trees given form the batch of `reinforce++`. A tree without
    leaves gets zeros.

    Args:
        trees: trees with a reward on every leaf.
        method: one of `METHODS`.
        leaf_norm: at2po: standardise rewards within the tree first.
        value: at2po: `child_softmax`, `child_mean` or `leaf_mean`.
        advantage: at2po: `node_value`, `diff_parent`, `diff_global` or `diff_localglobal`.
        k: passk: size of the set whose best counts.

    Raises:
        ValueError: an unknown choice, k < 1, or a leaf without a reward (tree and turn are named).
    """
    _check_choices(method, value, advantage, k)
    if not trees:
        return
    table = forest_table(trees)
    if method == "at2po":
        values = turn_values(table, leaf_norm=leaf_norm, value=value)
        _store(trees, table, values, turn_advantages(table, values, advantage=advantage), None)
        return
    methods: dict[str, Callable[[ForestTable], Floats]] = {
        "grpo": trajectory_credit.grpo,
        "tree_grpo": trajectory_credit.tree_grpo,
        "rloo": trajectory_credit.rloo,
        "reinforce++": trajectory_credit.reinforce_plus_plus,
        "passk": lambda t: trajectory_credit.pass_at_k(t, k),
    }
    of_leaf = methods[method](table)
    leaves = np.maximum(table.sum_leaves_below(table.multiplicity), 1.0)
    per_leaf = np.full(len(table.parent), np.nan)
    per_leaf[table.leaves] = of_leaf
    values = table.sum_leaves_below(table.multiplicity * table.reward) / leaves
    _store(trees, table, values, table.sum_leaves_below(table.multiplicity * of_leaf) / leaves, per_leaf)


def _check_choices(method: str, value: str, advantage: str, k: int) -> None:
    choices = (("method", method, METHODS), ("value", value, VALUES), ("advantage", advantage, ADVANTAGES))
    for name, given, allowed in choices:
        if given not in allowed:
            raise ValueError(f"assign_credit: {name}={given!r} must be one of {', '.join(allowed)}")
    if k < 1:
        raise ValueError(f"assign_credit: k={k} must be at least 1")


def _store(
    trees: Sequence[TurnTree], table: ForestTable, values: Floats, advantages: Floats, per_leaf: Floats | None
) -> None:
    for tree, start, end in zip(trees, table.offsets[:-1], table.offsets[1:], strict=True):
        tree.values = values[start:end].copy()
        tree.advantages = advantages[start:end].copy()
        tree.leaf_advantages = None if per_leaf is None else per_leaf[start:end].copy()
