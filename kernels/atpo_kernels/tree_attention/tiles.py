"""Sizes of the tiles of `tree_attention`'s kernels, by device, dtype and head width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# Widest heads: half precision, float32. Of float32 heads of 256 the gradient of queries does not fit the registers.
_MAX_WIDTH = 256, 128
SUMMED_KEYS = 16  # keys of one program of the sums of pieces
SINK_QUERIES = 1024  # queries at a time of the gradient of a sink


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """Sizes of blocks in tokens: of queries and keys in passes over queries, and in passes over keys."""

    queries: int
    keys: int
    queries_by_key: int
    keys_by_key: int


class Tile(NamedTuple):
    """The block sizes and launch options of a kernel."""

    rows: int
    """Pairs of a query and a query head of one group; for gradients of keys, queries of one head."""
    keys: int
    """Keys of one key head."""
    num_warps: int
    num_stages: int
    """Stages of the loop over full blocks."""
    partial_stages: int
    """Stages of the loop over partial blocks, which has more to keep in registers."""


class Tiles(NamedTuple):
    """Configurations of all kernels; the first two work on the same lists and so have equal rows and keys."""

    forward: Tile
    query_gradient: Tile
    key_gradient: Tile
    descriptors: bool = False
    """Whether what a loop runs over is loaded by tensor descriptors (the copy engine of Hopper and later) or through
    pointers."""

    def constants(self, tile: Tile, group: int, width: int) -> dict[str, Any]:
        """List the constants and options of the kernel of one of the tiles."""
        return {
            "DESCRIPTORS": self.descriptors,
            "PARTIAL_STAGES": tile.partial_stages,
            "GROUP": group,
            "WIDTH": width,
            "DEPTH": padded_width(width),
            "ROWS": tile.rows,
            "KEYS": tile.keys,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }


# By target: by padded head width: half precision, float32. Of shared memory, one block has 163 KiB on sm_80, 227 on
# sm_90 and sm_100 and 64 on gfx942; bench/kernels/RESOURCES.md has what every entry takes. float32 products run on the
# ordinary cores ("ieee"), where small tiles are enough: larger ones keep whole operands in registers.
_SINGLE = {
    64: Tiles(Tile(32, 32, 8, 1, 1), Tile(32, 32, 8, 1, 1), Tile(32, 32, 8, 1, 1)),
    128: Tiles(Tile(16, 16, 8, 1, 1), Tile(16, 16, 8, 1, 1), Tile(16, 32, 8, 1, 1)),
    256: Tiles(Tile(16, 16, 8, 1, 1), Tile(16, 16, 8, 1, 1), Tile(16, 16, 8, 1, 1)),
}
_TILES: dict[str, tuple[dict[int, Tiles], dict[int, Tiles]]] = {
    "sm_80": (
        {
            64: Tiles(Tile(128, 64, 4, 3, 3), Tile(128, 64, 8, 3, 3), Tile(64, 128, 8, 3, 3)),
            128: Tiles(Tile(128, 64, 8, 3, 3), Tile(128, 64, 8, 2, 2), Tile(64, 128, 8, 2, 2)),
            256: Tiles(Tile(64, 32, 4, 2, 2), Tile(64, 32, 8, 2, 2), Tile(32, 64, 8, 2, 2)),
        },
        _SINGLE,
    ),
    "sm_90": (
        {
            64: Tiles(Tile(128, 64, 4, 3, 3), Tile(128, 64, 8, 3, 3), Tile(64, 128, 8, 3, 3), descriptors=True),
            # a third stage of the last kernel spills under Triton 3.6
            128: Tiles(Tile(128, 64, 8, 3, 3), Tile(128, 64, 8, 3, 3), Tile(64, 128, 8, 2, 1), descriptors=True),
            256: Tiles(Tile(64, 32, 8, 3, 3), Tile(64, 32, 8, 2, 2), Tile(32, 64, 8, 2, 2), descriptors=True),
        },
        _SINGLE,
    ),
    "sm_100": (
        {
            64: Tiles(Tile(128, 64, 4, 3, 3), Tile(128, 64, 4, 3, 3), Tile(64, 128, 4, 3, 3), descriptors=True),
            128: Tiles(Tile(128, 64, 8, 3, 3), Tile(128, 64, 8, 3, 3), Tile(64, 128, 8, 3, 3), descriptors=True),
            256: Tiles(Tile(64, 32, 4, 3, 3), Tile(64, 32, 4, 2, 2), Tile(32, 64, 8, 2, 2), descriptors=True),
        },
        _SINGLE,
    ),
    "gfx942": (
        {
            64: Tiles(Tile(128, 64, 4, 1, 1), Tile(128, 64, 4, 1, 1), Tile(64, 64, 4, 1, 1)),
            128: Tiles(Tile(128, 32, 4, 1, 1), Tile(128, 32, 4, 1, 1), Tile(32, 64, 4, 1, 1)),
            256: Tiles(Tile(64, 16, 4, 1, 1), Tile(64, 16, 4, 1, 1), Tile(16, 32, 4, 1, 1)),
        },
        _SINGLE,
    ),
    # Triton's interpreter: small, so that small inputs have several blocks; of unequal sizes, so that none is mistaken
    # for another.
    "cpu": (dict.fromkeys((64, 128, 256), Tiles(Tile(32, 16, 4, 1, 1), Tile(32, 16, 4, 1, 1), Tile(32, 64, 4, 1, 1))),)
    * 2,
}

# Of key gradients under soft caps, where the ordinary tile would spill: the derivative of the cap takes registers too.
_CAPPED_KEY_GRADIENTS = {"sm_90": {128: Tile(32, 128, 8, 3, 3), 256: Tile(16, 64, 8, 2, 2)}}


def padded_width(width: int) -> int:
    """Round the width of a head up to the next power of two that the matrix units take."""
    return max(16, 1 << (width - 1).bit_length())


def has_tiles(dtype: torch.dtype, width: int) -> bool:
    """Say whether there are kernels for heads of this dtype and width."""
    return width <= _MAX_WIDTH[dtype == torch.float32]


def tiles_for(target: str, dtype: torch.dtype, width: int, capped: bool = False) -> Tiles:
    """Look up the tiles of a target ("sm_90", ..., "cpu") and head width, for scores with or without a soft cap.

    Raises ValueError for too wide heads.
    """
    if not has_tiles(dtype, width):
        limits = " and ".join(map(str, _MAX_WIDTH))
        raise ValueError(
            f"tree_attention: impl='triton' takes heads of at most {limits} dimensions (half precision, float32), "
            f"not {width} in {dtype}; use impl='auto' or 'torch'"
        )
    half, single = _TILES[target]
    depth = max(64, padded_width(width))
    if dtype == torch.float32:
        return single[depth]
    smaller = _CAPPED_KEY_GRADIENTS.get(target, {}).get(depth) if capped else None
    return half[depth] if smaller is None else half[depth]._replace(key_gradient=smaller)


def block_sizes(tiles: Tiles, group: int) -> BlockSizes:
    """Size the blocks of tiles whose rows are the queries of `group` heads, in tokens.

    Groups that are not a power of two leave a few rows idle. Raises ValueError if a tile has no room for one query.
    """
    rows, keys = tiles.query_gradient[:2]
    if group > rows:
        raise ValueError(f"tree_attention: impl='triton' takes at most {rows} query heads a key head here, not {group}")
    return BlockSizes(rows // group, keys, *tiles.key_gradient[:2])
