"""AT2PO: values of turns from the leaves up, and advantages from the values (design, section 3)."""

from __future__ import annotations

import numpy as np

from atpo_fast.credit.forest_table import Floats, ForestTable
from atpo_fast.credit.standardize import EPSILON, group_mean_std

VALUES = ("child_softmax", "child_mean", "leaf_mean")
ADVANTAGES = ("node_value", "diff_parent", "diff_global", "diff_localglobal")


def turn_values(table: ForestTable, *, leaf_norm: bool, value: str) -> Floats:
    """(N,) value of every turn.

    With `leaf_norm` rewards are standardised within the tree by the population std. Multiplicity counts trajectories:
    in that mean and std, and in `leaf_mean`; the child values weigh turns of the tree, each once, as the published code
    does, whose copies of a leaf are not in the tree. Turns without a leaf below have value 0.
    """
    z = _standardized_rewards(table) if leaf_norm else table.reward
    if value == "leaf_mean":
        leaves = table.sum_leaves_below(table.multiplicity)
        return table.sum_leaves_below(table.multiplicity * z) / np.maximum(leaves, 1.0)
    has_leaf = table.sum_leaves_below(table.multiplicity) > 0
    weight = np.where(has_leaf, _child_softmax(table) if value == "child_softmax" else 1.0, 0.0)
    total = table.sum_children(weight)
    values = np.zeros(len(table.parent))
    values[table.leaves] = z
    for level in table.levels[:0:-1]:
        parent = table.parent[level]
        np.add.at(values, parent, weight[level] * values[level] / total[parent])
    return values


def turn_advantages(table: ForestTable, values: Floats, *, advantage: str) -> Floats:
    """(N,) advantage of every turn from (N,) values; the differences are 0 at the root, which has no action."""
    if advantage == "node_value":
        return values.copy()
    local = values - np.where(table.parent >= 0, values[table.parent], values)
    root = np.repeat(table.offsets[:-1], np.diff(table.offsets))
    to_root = values - values[root]
    return {"diff_parent": local, "diff_global": to_root, "diff_localglobal": local + to_root}[advantage]


def _standardized_rewards(table: ForestTable) -> Floats:
    mean, std, _ = group_mean_std(table.reward, table.multiplicity, table.leaf_tree, ddof=0)
    return (table.reward - mean) / (std + EPSILON)


def _child_softmax(table: ForestTable) -> Floats:
    """(N,) exp(H), scaled within siblings so that the largest is 1."""
    inner = table.parent >= 0
    largest = np.full(len(table.parent), -np.inf)
    np.maximum.at(largest, table.parent[inner], table.nll[inner])
    return np.where(inner, np.exp(table.nll - np.where(inner, largest[table.parent], table.nll)), 1.0)
