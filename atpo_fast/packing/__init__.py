"""Packing: from trees (or flat trajectories) with credit to rows of unique tokens."""

from atpo_fast.packing.entropy_advantage import apply_entropy_advantage
from atpo_fast.packing.flat.batch import Trajectories
from atpo_fast.packing.flat.trajectories import from_trajectories
from atpo_fast.packing.pack import pack_trees, pruned_tokens
from atpo_fast.packing.spread import row_cost, spread_rows
from atpo_fast.tree.packed_rows import PackedTrees, empty_row

__all__ = [
    "PackedTrees",
    "Trajectories",
    "apply_entropy_advantage",
    "empty_row",
    "from_trajectories",
    "pack_trees",
    "pruned_tokens",
    "row_cost",
    "spread_rows",
]
