"""How the work of `tree_attention`'s kernels is cut: sizes of tiles, and which blocks of a row see one another.

Sizes of tiles are chosen by device, dtype and head width. Queries and keys are cut at multiples of them. A pair of
blocks is *full* if every query sees every key (no mask is evaluated there), *partial* if some query sees some key, and
absent otherwise.

From the side of the queries: the keys that a query sees are a few runs of consecutive tokens, one for each ancestor
that is not the first child of its parent (a first child follows its parent without a gap). A block of queries sees
what its first query sees, and its own tokens; a run becomes at most one partial block at either end and full blocks
between. From the side of the keys, blocks need no lists, as subtrees are ranges: keys [a, b) are seen by the queries
[a, max subtree_end), and all of them by [b - 1, min subtree_end).

A prefix of P tokens stands in front of the row's own tokens among the keys, and not among the queries; all queries see
all of it. Query blocks count the row's own tokens, key blocks count from the first token of the prefix: token i of the
row is query i and key P + i.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int32]
_ALIGNMENT = 4  # int32: every list starts at a multiple of 16 bytes
# Widest heads: half precision, float32. Of float32 heads of 256 the gradient of queries does not fit the registers.
_MAX_WIDTH = 256, 128
SUMMED_KEYS = 16  # keys of one program of the sums of pieces


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


def padded_width(width: int) -> int:
    """Round the width of a head up to the next power of two that the matrix units take."""
    return max(16, 1 << (width - 1).bit_length())


def has_tiles(dtype: torch.dtype, width: int) -> bool:
    """Say whether there are kernels for heads of this dtype and width."""
    return width <= _MAX_WIDTH[dtype == torch.float32]


def tiles_for(target: str, dtype: torch.dtype, width: int) -> Tiles:
    """Look up the tiles of a target ("sm_90", ..., "cpu") and head width. Raises ValueError for too wide heads."""
    if not has_tiles(dtype, width):
        limits = " and ".join(map(str, _MAX_WIDTH))
        raise ValueError(
            f"tree_attention: impl='triton' takes heads of at most {limits} dimensions (half precision, float32), "
            f"not {width} in {dtype}; use impl='auto' or 'torch'"
        )
    half, single = _TILES[target]
    return (single if dtype == torch.float32 else half)[max(64, padded_width(width))]


def block_sizes(tiles: Tiles, group: int) -> BlockSizes:
    """Size the blocks of tiles whose rows are the queries of `group` heads, in tokens.

    Groups that are not a power of two leave a few rows idle. Raises ValueError if a tile has no room for one query.
    """
    rows, keys = tiles.query_gradient[:2]
    if group > rows:
        raise ValueError(f"tree_attention: impl='triton' takes at most {rows} query heads a key head here, not {group}")
    return BlockSizes(rows // group, keys, *tiles.key_gradient[:2])


@dataclass(frozen=True, slots=True)
class TreeBlockLists:
    """Lists of the blocks of one row for `tree_attention(impl="triton")`; all tensors int32, on the row's device."""

    tokens: int
    prefix: int
    window: int | None
    sizes: BlockSizes
    key_heads: int
    query_order: Tensor
    """(B,) query blocks, those that see most key blocks first."""
    full_offsets: Tensor
    """(B + 1,) CSR: query block i sees all of the key blocks full[full_offsets[i] : full_offsets[i + 1]]."""
    full: Tensor
    partial_offsets: Tensor
    """(B + 1,) CSR offsets of the key blocks of which each query block sees a part."""
    partial: Tensor
    key_parts: Tensor
    """(W, 6) pieces of work for gradients of keys, longest first: key block; bounds lo <= full_lo <= full_hi <= hi of
    the query blocks that see it, full ones in the middle; slot for a partial sum, or -1 if the piece is all of it."""
    split_keys: Tensor
    """(S, 3) key blocks in several pieces: block, first slot, after the last slot."""
    slots: int

    def to(self, device: torch.device | str) -> TreeBlockLists:
        """Copy the lists to another device, all at once and without waiting for it."""
        names = [f.name for f in fields(self) if isinstance(getattr(self, f.name), Tensor)]
        moved = _join([getattr(self, name) for name in names], torch.device(device))
        changes: dict[str, Any] = dict(zip(names, moved, strict=True))
        return replace(self, **changes)


def make_tree_block_lists(
    subtree_end: Tensor,  # (T,) int32
    sizes: BlockSizes,
    *,
    key_heads: int = 1,
    workers: int = 132,
    prefix: int = 0,
) -> TreeBlockLists:
    """List the blocks of a row behind a prefix, on the host: O(turns * depth + tokens + listed blocks), in NumPy.

    Key blocks that very many queries see are cut in pieces, so that of the work that `workers` multiprocessors do for
    `key_heads` heads none is a long tail. Raises ValueError if subtree_end is not that of depth-first pre-order.
    """
    end = subtree_end.detach().cpu().numpy().astype(np.int32, copy=False)
    turns = _find_turns(end, prefix)
    found = _key_lists(turns, prefix, prefix + len(end), sizes)
    order, full_offsets, full, partial_offsets, partial = map(torch.from_numpy, found)
    parts, split, slots = _query_ranges(end, prefix, sizes, key_heads, workers)
    return TreeBlockLists(
        tokens=len(end),
        prefix=prefix,
        window=None,
        sizes=sizes,
        key_heads=key_heads,
        query_order=order,
        full_offsets=full_offsets,
        full=full,
        partial_offsets=partial_offsets,
        partial=partial,
        key_parts=torch.from_numpy(parts),
        split_keys=torch.from_numpy(split),
        slots=slots,
    )


class _Turns(NamedTuple):
    """Stretches of tokens with one subtree_end, in order and counted as keys; (N,) each, and a last one without tokens
    that means "none". They are not quite turns: a turn and its only child make one. A prefix is the first."""

    start: Ints
    stop: Ints
    end: Ints  # subtree_end
    parent: Ints  # nearest stretch before this one whose subtree holds it, or N
    run_start: Ints  # first token of the run of visible tokens that ends with this stretch
    above: Ints  # last stretch of the run of visible tokens before that, or N


def _find_turns(end: Ints, prefix: int) -> _Turns:
    """Find the stretches of a row (T,) behind a prefix, and what lies above each."""
    tokens = prefix + len(end)
    start = np.flatnonzero(np.append(True, end[1:] != end[:-1])[: len(end)]).astype(np.int32)
    ends = end[start] + np.int32(prefix)
    start += np.int32(prefix)
    if prefix:
        start, ends = np.append(np.int32(0), start), np.append(np.int32(tokens), ends)
    stop = np.append(start[1:], np.int32(tokens))[: len(start)]
    if np.any(ends < stop) or np.any(ends > tokens):
        raise ValueError("make_tree_block_lists: subtree_end[k] must lie in (k, T]")
    none = len(start)
    parent: list[int] = []
    run_start: list[int] = []
    above: list[int] = []
    path: list[int] = []
    starts, stops, stretch_ends = start.tolist(), stop.tolist(), ends.tolist()
    for i in range(none):
        while path and stretch_ends[path[-1]] <= starts[i]:
            path.pop()
        up = path[-1] if path else none
        if up < none and stretch_ends[i] > stretch_ends[up]:
            raise ValueError("make_tree_block_lists: the subtrees of subtree_end overlap without one holding the other")
        first = up < none and stops[up] == starts[i]
        parent.append(up)
        run_start.append(run_start[up] if first else starts[i])
        above.append(above[up] if first else up)
        path.append(i)
    linked = np.array([[*parent, none], [*run_start, tokens], [*above, none]], np.int32)
    start, stop, ends = (np.append(x, np.int32(last)) for x, last in ((start, tokens), (stop, 0), (ends, 0)))
    return _Turns(start, stop, ends, *linked)


def _key_lists(turns: _Turns, prefix: int, tokens: int, sizes: BlockSizes) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Make query_order, full_offsets, full, partial_offsets and partial of TreeBlockLists; `tokens` with the prefix."""
    size = sizes.keys
    first = np.arange(prefix, tokens, sizes.queries, dtype=np.int32)  # query of each block, counted as a key
    after = np.minimum(first + sizes.queries, tokens).astype(np.int32)
    # 1. the runs of visible tokens [lo, hi) of every query block, its own first and then upwards
    own = np.searchsorted(turns.start[:-1], first, side="right") - 1
    chain_offsets, chain = _chains(turns)
    count = np.diff(chain_offsets)[own]
    offsets = _offsets(count)
    at = np.repeat(chain_offsets[own] - offsets[:-1], count) + np.arange(offsets[-1], dtype=np.int32)
    turn = chain[at]
    lo, hi = turns.run_start[turn], turns.stop[turn]
    hi[offsets[:-1]] = after
    # 2. the tokens [lo, common) of each run that all of the block's queries see
    common = turns.stop[turn]
    last = np.repeat(after, count)
    beyond, up = np.arange(len(turn), dtype=np.int32), turn
    while len(beyond):  # those whose block goes on behind the subtree of the turn that the run ended with so far
        shorter = (turns.end[up] < last[beyond]) & (common[beyond] > lo[beyond])
        beyond, up = beyond[shorter], turns.parent[up[shorter]]
        common[beyond] = turns.stop[up]
    common[offsets[:-1]] = np.minimum(common[offsets[:-1]], first + 1)
    # 3. blocks: head [head, full), full ones [full, tail), and tail [tail, stop); one that is also the last of the run
    # above is left to that
    above = (-(-turns.stop[turns.above] // size))[turn]
    head, full = np.maximum(lo // size, above), -(-lo // size)
    tail = np.maximum(common // size, full)
    stop = np.maximum(-(-hi // size), tail)
    partial_starts = np.stack([head, tail], 1).ravel()
    partial_counts = np.stack([full - head, stop - tail], 1).ravel()
    full_offsets = _offsets(tail - full)[offsets]
    partial_offsets = _offsets(partial_counts)[2 * offsets]
    listed = np.diff(full_offsets) + np.diff(partial_offsets)
    order = np.argsort(-listed, kind="stable").astype(np.int32)
    return order, full_offsets, _expand(full, tail - full), partial_offsets, _expand(partial_starts, partial_counts)


def _chains(turns: _Turns) -> tuple[Ints, Ints]:
    """List for every turn, as a CSR, the turn itself and the last turns of the runs above it."""
    none = len(turns.above) - 1
    levels = [np.arange(none, dtype=np.int32)]
    members = [levels[0]]
    while len(members[-1]):
        up = turns.above[levels[-1]]
        alive = up < none
        levels.append(up[alive])
        members.append(members[-1][alive])
    turn, level_turn = np.concatenate(members), np.concatenate(levels)
    order = np.argsort(turn, kind="stable")
    return _offsets(np.bincount(turn, minlength=none)), level_turn[order]


def _query_ranges(end: Ints, prefix: int, sizes: BlockSizes, key_heads: int, workers: int) -> tuple[Ints, Ints, int]:
    """Make key_parts, split_keys and slots of TreeBlockLists."""
    tokens, size = len(end), sizes.queries_by_key
    if tokens == 0:
        return np.zeros((0, 6), np.int32), np.zeros((0, 3), np.int32), 0
    ends = np.append(np.full(prefix, tokens, np.int32), end) if prefix else end
    at = np.arange(0, len(ends), sizes.keys_by_key, dtype=np.int32)  # key of each block
    last_end, common_end = np.maximum.reduceat(ends, at), np.minimum.reduceat(ends, at)
    # 1. query blocks [lo, hi) see the key block, [full_lo, full_hi) see all of it; never a short last one
    # (queries from `first` on may see the first key of the block, those from `last` on the last one)
    first, last = (np.maximum(x - prefix, 0) for x in (at, at + sizes.keys_by_key - 1))
    lo, hi = first // size, -(-last_end // size)
    full_lo = np.minimum(-(-last // size), hi)
    full_hi = np.maximum(common_end // size, full_lo)
    # 2. pieces of at most half of what a multiprocessor has to do
    total = int((hi - lo).sum()) * key_heads
    most = max(1, -(-total // (2 * workers)))
    pieces = -(-(hi - lo) // most)
    offsets = _offsets(pieces)
    block = np.repeat(np.arange(len(first), dtype=np.int32), pieces)
    piece = np.arange(offsets[-1], dtype=np.int32) - offsets[block]
    length = -(-(hi - lo) // pieces)[block]
    part_lo = np.minimum(lo[block] + piece * length, hi[block])
    part_hi = np.minimum(part_lo + length, hi[block])
    bounds = [np.clip(x, part_lo, part_hi) for x in (full_lo[block], full_hi[block])]
    # 3. slots for the sums of the pieces of one block, side by side
    split = pieces > 1
    slot = _offsets(np.where(split, pieces, 0))
    slots = np.where(split[block], slot[block] + piece, -1)
    parts = np.stack([block, part_lo, *bounds, part_hi, slots], 1)
    parts = parts[np.argsort(part_lo - part_hi, kind="stable")]
    splits = np.stack([np.arange(len(first)), slot[:-1], slot[1:]], 1)[split]
    return np.ascontiguousarray(parts, np.int32), np.ascontiguousarray(splits, np.int32), int(slot[-1])


def _offsets(counts: NDArray[np.integer]) -> Ints:
    """Sum all counts before each place: (N,) -> (N + 1,)."""
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, dtype=np.int32, out=offsets[1:])
    return offsets


def _expand(starts: Ints, counts: Ints) -> Ints:
    """Write out the numbers start, start + 1, ... of every range, one range after the other."""
    before = _offsets(counts)
    expanded = np.repeat(starts - before[:-1], counts)
    expanded += np.arange(before[-1], dtype=np.int32)
    return expanded


def _join(lists: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copy lists to a device in one buffer."""
    padded = [-(-x.numel() // _ALIGNMENT) * _ALIGNMENT for x in lists]
    pin = device.type == "cuda"
    buffer = torch.empty(sum(padded), dtype=torch.int32, pin_memory=pin)
    places = buffer.split(padded)
    for place, values in zip(places, lists, strict=True):
        place[: values.numel()] = values.flatten()
    moved = buffer.to(device, non_blocking=True).split(padded)
    return [place[: x.numel()].view(x.shape) for place, x in zip(moved, lists, strict=True)]
