"""Clip ranges of single turns: from the trees that have them to the packed rows (docs/design.md#clipping)."""

from __future__ import annotations

import numpy as np

from atpo_fast.objective import Objective
from atpo_fast.tree import TurnTree
from atpo_fast.tree.forest import Floats, Forest


def turn_clip_ranges(forest: Forest, objective: Objective) -> dict[str, Floats]:
    """Collect `clip_low` and `clip_high` of all turns, (N,) each; what no tree has is not among them.

    Turns of trees without such a range, and those whose entry is nan, get the objective's. A tree's `clip_scale`
    multiplies both.

    Raises ValueError, naming the tree, for ranges that are negative or not one per turn, and under an objective that
    has no clip range for a turn: ratio level `sequence`, or the sapo gate.
    """
    config = objective.loss_config
    found = {}
    for name, usual in (("clip_low", config.clip_low), ("clip_high", config.clip_high)):
        if all(getattr(tree, name) is None and tree.clip_scale is None for tree in forest.trees):
            continue
        if config.level == "sequence" or config.clip == "sapo":
            why = "ratio level sequence" if config.level == "sequence" else "clip sapo"
            raise ValueError(f"trees have a {name} for each turn, which {why} cannot use: leave it out")
        parts = [_of_tree(tree, name, usual, forest.names[t]) for t, tree in enumerate(forest.trees)]
        found[name] = np.concatenate([np.zeros(0), *parts])
    return found


def _of_tree(tree: TurnTree, name: str, usual: float, title: str) -> Floats:
    given, scale = getattr(tree, name), tree.clip_scale
    values = np.full(len(tree), usual) if given is None else np.where(np.isnan(given), usual, given)
    if scale is not None and len(scale) == len(values):
        values = values * scale
    if len(values) != len(tree) or (values < 0).any():
        raise ValueError(f"tree {title}: {name} must be one number of at least 0 for each of its {len(tree)} turns")
    return values
