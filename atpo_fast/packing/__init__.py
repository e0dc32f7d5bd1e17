"""Packing: from trees (or flat trajectories) with credit to rows of unique tokens."""

from atpo_fast.packing.entropy_advantage import apply_entropy_advantage
from atpo_fast.packing.flat_batch import Trajectories
from atpo_fast.packing.pack import pack_trees, pruned_tokens
from atpo_fast.packing.packed_trees import PackedTrees
from atpo_fast.packing.passes import Pass, plan_passes
from atpo_fast.packing.spread import empty_row, row_cost, spread_rows
from atpo_fast.packing.trajectories import from_trajectories

__all__ = [
    "PackedTrees",
    "Pass",
    "Trajectories",
    "apply_entropy_advantage",
    "empty_row",
    "from_trajectories",
    "pack_trees",
    "plan_passes",
    "pruned_tokens",
    "row_cost",
    "spread_rows",
]
