"""How the LM head's matrix product is cut into tiles, by device and dtype, in Triton and in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """One configuration of the kernels that multiply `hidden` by the transposed `weight`."""

    rows: int
    """Rows of hidden states in a tile."""
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

    def constants(self, has_bias: bool) -> dict[str, Any]:
        """List the constants and options of the kernels that multiply by this tile.

        Flattened loops fetch the next tile while this one's exponentials are computed; with a bias they take too many
        registers.
        """
        return {
            "HAS_BIAS": has_bias,
            "DESCRIPTORS": self.descriptors,
            "FLATTEN": self.descriptors and not has_bias,
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "GROUP": self.group,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# By target: half precision, float32. On sm_90 two warpgroups of 64 x 256 each; three stages and the stored tile take
# 209 of 227 KiB of shared memory. bench/kernels/RESOURCES.md has what every entry takes.
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
    """Look up the tile of a target ("sm_90", ..., "cpu") and dtype."""
    half, single = _TILES[target]
    return single if dtype == torch.float32 else half


# Ranges of the vocabulary, at most, and the rows whose partial results a program merges. Both are fixed, so that
# another number of rows, which asks for another number of ranges, compiles nothing.
MOST_SPLITS, MERGED_ROWS = 64, 16


@lru_cache(maxsize=256)
def vocab_splits(rows: int, vocab: int, tile: Tile, workers: int) -> int:
    """Choose into how many ranges the vocabulary is cut, each the work of one program per row tile.

    Time is the number of waves of programs times the tiles of a program; the smallest count within 1 % of the best.
    """
    row_tiles, column_tiles = ceil(rows / tile.rows), ceil(vocab / tile.columns)

    def time(splits: int) -> int:
        return ceil(row_tiles * splits / workers) * ceil(column_tiles / splits)

    candidates = range(1, min(column_tiles, MOST_SPLITS) + 1)
    best = min(time(splits) for splits in candidates)
    return next(splits for splits in candidates if time(splits) <= 1.01 * best)


# In PyTorch, by kind of device. A chunk: rows of the whole vocabulary, whose logits are kept from the statistics to the
# gradients.
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 29}
_MIN_ROWS = {"cpu": 192, "cuda": 1024}
# A tile: rows and words whose logits are computed again; near square, so that matrix products run fast.
_TORCH_TILES = {"cpu": (512, 2048), "cuda": (4096, 32768)}
# A block: rows of a chunk or tile that pass through the elementwise operations together; on a CPU they stay in cache.
_BLOCK_BYTES = {"cpu": 1 << 19, "cuda": 1 << 29}


def torch_rows(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Choose the rows of a chunk: those whose logits fill its buffer, and enough to keep a matrix product busy."""
    kind = _kind(device)
    return max(_MIN_ROWS[kind], _CHUNK_BYTES[kind] // (vocab * dtype.itemsize))


def torch_tile(device: torch.device) -> tuple[int, int]:
    """Look up the rows and words of a tile."""
    return _TORCH_TILES[_kind(device)]


def elementwise_blocks(chunk: Tensor) -> list[slice]:  # (C, V)
    """Cut the rows of a chunk into blocks."""
    size = max(1, _BLOCK_BYTES[_kind(chunk.device)] // (chunk.shape[1] * chunk.itemsize))
    return [slice(start, min(start + size, len(chunk))) for start in range(0, len(chunk), size)]


def _kind(device: torch.device) -> str:
    """Name the kind of device: "cpu", or "cuda" for all GPUs."""
    return "cpu" if device.type == "cpu" else "cuda"
