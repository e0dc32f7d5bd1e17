"""AT2PO: values of turns from the leaves up, and advantages from the values (docs/design.md#credit)."""

from __future__ import annotations

import numpy as np

from atpo_fast.credit.standardize import EPSILON, group_mean_std
from atpo_fast.tree.forest import Floats, Forest


def turn_values(forest: Forest, reward: Floats, *, leaf_norm: bool, value: str) -> Floats:
    """Compute the value of every turn, (N,), from the (S,) `reward` of the leaves.

    With `leaf_norm` rewards are standardised within the tree by the population std. A leaf of multiplicity m counts as
    m siblings of equal reward and entropy, like the copies that the published code adds to its trees: in that mean and
    std, and in the value of every turn above. Turns without a leaf below have value 0.
    """
    z = _standardized(forest, reward) if leaf_norm else reward
    if value == "leaf_mean":
        leaves = forest.sum_leaves_below(forest.multiplicity)
        return forest.sum_leaves_below(forest.multiplicity * z) / np.maximum(leaves, 1.0)
    has_leaf = forest.sum_leaves_below(forest.multiplicity) > 0
    weight = np.where(has_leaf, _child_softmax(forest) if value == "child_softmax" else 1.0, 0.0)
    weight[forest.leaves] *= forest.multiplicity
    total = forest.sum_children(weight)
    values = np.zeros(len(forest.parent))
    values[forest.leaves] = z
    for level in forest.levels[:0:-1]:
        parent = forest.parent[level]
        np.add.at(values, parent, weight[level] * values[level] / total[parent])
    return values


def turn_advantages(forest: Forest, values: Floats, *, advantage: str) -> Floats:
    """Compute the advantage of every turn, (N,), from (N,) `values`.

    The differences are 0 at the root, which has no action.
    """
    if advantage == "node_value":
        return values.copy()
    local = values - np.where(forest.parent >= 0, values[forest.parent], values)
    to_root = values - values[forest.tree_offsets[forest.tree]]
    return {"diff_parent": local, "diff_global": to_root, "diff_localglobal": local + to_root}[advantage]


def _standardized(forest: Forest, reward: Floats) -> Floats:
    """Standardise the (S,) `reward` of the leaves within each tree, with the population std: (S,)."""
    mean, std, _ = group_mean_std(reward, forest.multiplicity, forest.tree[forest.leaves], ddof=0)
    return (reward - mean) / (std + EPSILON)


def _child_softmax(forest: Forest) -> Floats:
    """Weigh every turn by exp(H), scaled within siblings so that the largest is 1: (N,)."""
    inner, entropy = forest.parent >= 0, forest.nll
    largest = np.full(len(forest.parent), -np.inf)
    np.maximum.at(largest, forest.parent[inner], entropy[inner])
    return np.where(inner, np.exp(entropy - np.where(inner, largest[forest.parent], entropy)), 1.0)
