"""How the LM head's matrix product is cut into tiles, by device and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """One configuration of the kernels that multiply `hidden` by the transposed `weight`."""

    rows: int
    """Rows of hidden in a tile."""
    columns: int
    """Vocabulary entries in a tile."""
    depth: int
    """Length of a step along the width."""
    num_warps: int
    num_stages: int
    descriptors: bool
    """Whether tiles are moved by tensor descriptors (the copy engine of Hopper and later) or through pointers."""
    group: int = 16
    """Row tiles that run side by side, so that they share the weight's tiles in the L2 cache."""


# By target: half precision, float32. On sm_90 two warpgroups of 64 x 256 each; three stages and the stored tile take
# 209 of 227 KiB of shared memory. bench/RESOURCES.md has what every entry takes.
_TILES: dict[str, tuple[Tile, Tile]] = {
    "sm_80": (
        Tile(128, 128, 32, num_warps=8, num_stages=4, descriptors=False),
        Tile(64, 64, 16, num_warps=8, num_stages=4, descriptors=False),
    ),
    "sm_90": (
        Tile(128, 256, 64, num_warps=8, num_stages=3, descriptors=True),
        Tile(64, 64, 16, num_warps=8, num_stages=4, descriptors=False),
    ),
    "sm_100": (
        Tile(128, 128, 64, num_warps=8, num_stages=4, descriptors=True),
        Tile(64, 64, 16, num_warps=8, num_stages=4, descriptors=False),
    ),
    "gfx942": (
        Tile(128, 128, 32, num_warps=8, num_stages=2, descriptors=False),
        Tile(64, 64, 16, num_warps=8, num_stages=2, descriptors=False),
    ),
    # Triton's interpreter: small, so that small inputs have several tiles.
    "cpu": (
        Tile(16, 64, 32, num_warps=4, num_stages=1, descriptors=True, group=2),
        Tile(16, 64, 32, num_warps=4, num_stages=1, descriptors=False, group=2),
    ),
}


def tile_for(target: str, dtype: torch.dtype) -> Tile:
    """The tile of a target and dtype."""
    half, single = _TILES[target]
    return single if dtype == torch.float32 else half


@lru_cache(maxsize=256)
def vocab_splits(rows: int, vocab: int, tile: Tile, workers: int) -> int:
    """Into how many ranges the vocabulary is cut, each the work of one program per row tile.

    Time is the number of waves of programs times the tiles of a program; the smallest count within 1 % of the best.
    """
    row_tiles, column_tiles = ceil(rows / tile.rows), ceil(vocab / tile.columns)

    def time(splits: int) -> int:
        return ceil(row_tiles * splits / workers) * ceil(column_tiles / splits)

    candidates = range(1, min(column_tiles, 64) + 1)
    best = min(time(splits) for splits in candidates)
    return next(splits for splits in candidates if time(splits) <= 1.01 * best)
