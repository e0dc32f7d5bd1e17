"""Which blocks of queries and keys of a row see one another: the lists that `tree_attention`'s kernels go through.

Queries and keys are cut at multiples of the sizes of tiles. A pair of blocks is *full* if every query sees every key
(no mask is evaluated there), *partial* if some query sees some key, and absent otherwise.

From the side of the queries: a query sees the tokens of the stretches above it (tokens with one subtree_end), from the
first key of its window on. A block of queries sees what its first query sees, its own tokens, and behind windows what
the others still see of the first one's stretches. From the side of the keys, blocks need no lists without windows, as
subtrees are ranges: keys [a, b) are seen by the queries [a, max subtree_end), and all of them by [b - 1, min
subtree_end). With windows the pairs that the queries see are listed by key.

A prefix of P tokens stands in front of the row's own tokens among the keys, and not among the queries; all queries see
all of it, or with a window its end. Query blocks count the row's own tokens, key blocks count from the first token of
the prefix: token i of the row is query i and key P + i.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atpo_kernels.tree_attention.tiles import BlockSizes

Ints = NDArray[np.int32]
_ALIGNMENT = 4  # int32: every list starts at a multiple of 16 bytes


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
    the query blocks that see it (with a window: of their places in query_blocks), full ones in the middle; slot for a
    partial sum, or -1 if the piece is all of it."""
    split_keys: Tensor
    """(S, 3) key blocks in several pieces: block, first slot, after the last slot."""
    slots: int
    query_blocks: Tensor | None
    """Query blocks that see each key block, one key block after the other; None without a window."""
    first_keys: Tensor | None
    """(T,) first key of each query's window, counted as queries: below 0 in the prefix; None without a window."""

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
    window: int | None = None,
) -> TreeBlockLists:
    """List the blocks of a row behind a prefix, on the host: O(turns * depth + tokens + listed blocks), in NumPy.

    Key blocks that very many queries see are cut in pieces, so that of the work that `workers` multiprocessors do for
    `key_heads` heads none is a long tail. Raises ValueError if subtree_end is not that of depth-first pre-order.
    """
    end = subtree_end.detach().cpu().numpy().astype(np.int32, copy=False)
    turns = _find_turns(end, prefix)
    first_keys = None if window is None else _find_first_keys(turns, prefix + len(end), window)
    pairs = _find_pairs(turns, first_keys, prefix, prefix + len(end), sizes.queries, sizes.keys)
    order, full_offsets, full, partial_offsets, partial = map(torch.from_numpy, _key_lists(pairs, len(end), sizes))
    if first_keys is None:
        bounds, query_blocks = _query_ranges(end, prefix, sizes), None
    else:
        bounds, query_blocks = _query_lists(turns, first_keys, prefix, prefix + len(end), sizes)
    parts, split, slots = _cut_pieces(bounds, key_heads, workers)
    return TreeBlockLists(
        tokens=len(end),
        prefix=prefix,
        window=window,
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
        query_blocks=None if query_blocks is None else torch.from_numpy(query_blocks),
        first_keys=None if first_keys is None else torch.from_numpy(first_keys[prefix:] - np.int32(prefix)),
    )


class _Turns(NamedTuple):
    """Stretches of tokens with one subtree_end, in order and counted as keys; (N,) each. They are not quite turns: a
    turn and its only child make one. A prefix is the first."""

    start: Ints
    stop: Ints
    end: Ints  # subtree_end
    parent: Ints  # nearest stretch before this one whose subtree holds it, or -1
    depth: Ints  # number of stretches above
    position: Ints  # number of tokens in them


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
    above: list[tuple[int, int, int]] = []  # parent, depth and position of each
    path: list[int] = []
    starts, stops, stretch_ends = start.tolist(), stop.tolist(), ends.tolist()
    for i in range(len(start)):
        while path and stretch_ends[path[-1]] <= starts[i]:
            path.pop()
        if path:
            up = path[-1]
            if stretch_ends[i] > stretch_ends[up]:
                raise ValueError("make_tree_block_lists: the subtrees of subtree_end overlap, neither holds the other")
            above.append((up, len(path), above[up][2] + stops[up] - starts[up]))
        else:
            above.append((-1, 0, 0))
        path.append(i)
    return _Turns(start, stop, ends, *np.array(above, np.int32).reshape(-1, 3).T)


def _find_first_keys(turns: _Turns, tokens: int, window: int) -> Ints:
    """Find the first key in the window of every key, (P + T,)."""
    first, path = np.empty(tokens, np.int32), np.empty(tokens, np.int32)
    for start, stop, position in zip(turns.start.tolist(), turns.stop.tolist(), turns.position.tolist(), strict=True):
        last = position + stop - start
        path[position:last] = np.arange(start, stop)  # in pre-order what lies before is the path of this stretch
        first[start:stop] = path[np.maximum(np.arange(position + 1, last + 1) - window, 0)]
    return first


class _Pairs(NamedTuple):
    """Blocks of queries and of keys that see one another; sorted by query block, then by key block."""

    full_query: Ints  # (F,) query block of each range of key blocks that it sees all of
    full_key: Ints  # first key block of the range
    full_count: Ints  # number of key blocks
    query: Ints  # (N,) query block of each pair that is partial
    key: Ints


def _find_pairs(
    turns: _Turns, first_keys: Ints | None, prefix: int, tokens: int, queries: int, keys: int
) -> _Pairs:  # `tokens` with the prefix
    """Find which blocks of that many queries and keys see one another."""
    first = np.arange(prefix, tokens, queries, dtype=np.int32)  # query of each block, counted as a key
    after = np.minimum(first + queries, tokens).astype(np.int32)
    # 1. the stretches of the path of every block's first query from the root on, and what follows it in its block
    own = np.searchsorted(turns.start, first, side="right").astype(np.int32) - 1
    offsets = _offsets(turns.depth[own] + 2)
    rest = offsets[1:] - 1
    turn = np.empty(offsets[-1], np.int32)
    turn[rest] = own
    block, up = np.arange(len(first), dtype=np.int32), own
    while len(block):
        turn[offsets[block] + turns.depth[up]] = up
        block, up = block[turns.parent[up] >= 0], turns.parent[up]
        up = up[up >= 0]
    # 2. of each, the keys [some, stop) that queries of the block see, and [every, stop) that all of them see
    block = np.repeat(np.arange(len(first), dtype=np.int32), np.diff(offsets))
    stop = np.minimum(turns.stop[turn], first[block] + 1)
    stop[rest] = after
    below = np.minimum(turns.end[turn], after[block])  # queries before it are below the stretch
    some = every = turns.start[turn]
    if first_keys is not None:
        windows = np.pad(first_keys[prefix:], (0, -(tokens - prefix) % queries), mode="edge").reshape(-1, queries)
        nearest = np.minimum.accumulate(windows, 1)[block, below - first[block] - 1]
        some, every = np.maximum(some, nearest), np.maximum(every, windows.max(1)[block])
    every = np.where(below == after[block], np.minimum(every, stop), stop)
    some[rest], every[rest] = first + 1, after
    # 3. blocks: [head, full) and [tail, last) at the borders, and full ones between
    some = np.minimum(some, stop)
    full = -(-every // keys)
    tail = np.maximum(stop // keys, full)
    head = np.where(some < stop, some // keys, full)
    last = np.where(some < stop, np.maximum(-(-stop // keys), tail), tail)
    starts, counts = np.stack([head, tail], 1).ravel(), np.stack([full - head, last - tail], 1).ravel()
    key, at = _expand(starts, counts), np.repeat(np.arange(len(counts), dtype=np.int32) // 2, counts)
    # 4. a border block may be that of several stretches, and of all its keys then be seen by all queries
    seen = np.minimum(stop[at], (key + 1) * keys) - np.maximum(every[at], key * keys)
    query = block[at]
    begins = np.flatnonzero(np.append(True, (np.diff(query) != 0) | (np.diff(key) != 0))[: len(key)])
    query, key = query[begins], key[begins]
    whole = np.add.reduceat(np.maximum(seen, 0), begins) == keys if len(begins) else np.zeros(0, bool)
    inner = tail > full
    ranges = [
        np.concatenate([of_inner[inner], of_border])
        for of_inner, of_border in ((block, query[whole]), (full, key[whole]), (tail - full, np.ones(whole.sum(), int)))
    ]
    order = np.lexsort(ranges[1::-1])
    full_query, full_key, full_count = (x[order].astype(np.int32) for x in ranges)
    return _Pairs(full_query, full_key, full_count, query[~whole], key[~whole])


def _key_lists(pairs: _Pairs, tokens: int, sizes: BlockSizes) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Make query_order, full_offsets, full, partial_offsets and partial of TreeBlockLists."""
    blocks = -(-tokens // sizes.queries)
    full = np.bincount(pairs.full_query, pairs.full_count, minlength=blocks).astype(np.int32)
    partial = np.bincount(pairs.query, minlength=blocks)
    order = np.argsort(-full - partial, kind="stable").astype(np.int32)
    return order, _offsets(full), _expand(pairs.full_key, pairs.full_count), _offsets(partial), pairs.key


class _Bounds(NamedTuple):
    """Of each block of keys, which query blocks see it: [lo, hi), and [full_lo, full_hi) all of it; (K,) each."""

    lo: Ints
    full_lo: Ints
    full_hi: Ints
    hi: Ints


def _query_ranges(end: Ints, prefix: int, sizes: BlockSizes) -> _Bounds:
    """Find the query blocks that see each key block where there is no window: they are ranges."""
    tokens, size = len(end), sizes.queries_by_key
    if tokens == 0:
        return _Bounds(end, end, end, end)
    ends = np.append(np.full(prefix, tokens, np.int32), end) if prefix else end
    at = np.arange(0, len(ends), sizes.keys_by_key, dtype=np.int32)  # key of each block
    last_end, common_end = np.maximum.reduceat(ends, at), np.minimum.reduceat(ends, at)
    # never a short last block is full (queries from `first` on may see the first key of the block, those from `last`
    # on the last one)
    first, last = (np.maximum(x - prefix, 0) for x in (at, at + sizes.keys_by_key - 1))
    lo, hi = first // size, -(-last_end // size)
    full_lo = np.minimum(-(-last // size), hi)
    return _Bounds(lo, full_lo, np.maximum(common_end // size, full_lo), hi)


def _query_lists(
    turns: _Turns, first_keys: Ints, prefix: int, tokens: int, sizes: BlockSizes
) -> tuple[_Bounds, Ints]:  # `tokens` with the prefix
    """List the query blocks that see each key block, full ones first; the bounds are places in the list."""
    if tokens == prefix:
        return _Bounds(*[np.zeros(0, np.int32)] * 4), np.zeros(0, np.int32)
    pairs = _find_pairs(turns, first_keys, prefix, tokens, sizes.queries_by_key, sizes.keys_by_key)
    query = np.concatenate([np.repeat(pairs.full_query, pairs.full_count), pairs.query])
    key = np.concatenate([_expand(pairs.full_key, pairs.full_count), pairs.key])
    full = np.arange(len(key)) < pairs.full_count.sum()
    full &= (query + 1) * sizes.queries_by_key <= tokens - prefix  # never a short last block
    blocks = -(-tokens // sizes.keys_by_key)
    offsets = _offsets(np.bincount(key, minlength=blocks))
    full_stop = offsets[:-1] + np.bincount(key[full], minlength=blocks).astype(np.int32)
    listed = query[np.argsort(2 * key + ~full, kind="stable")]
    return _Bounds(offsets[:-1], offsets[:-1], full_stop, offsets[1:]), listed


def _cut_pieces(bounds: _Bounds, key_heads: int, workers: int) -> tuple[Ints, Ints, int]:
    """Make key_parts, split_keys and slots of TreeBlockLists."""
    lo, full_lo, full_hi, hi = bounds
    # 1. pieces of at most half of what a multiprocessor has to do; one where there is no work: it writes zeros
    total = int((hi - lo).sum()) * key_heads
    most = max(1, -(-total // (2 * workers)))
    pieces = np.maximum(-(-(hi - lo) // most), 1)
    offsets = _offsets(pieces)
    block = np.repeat(np.arange(len(lo), dtype=np.int32), pieces)
    piece = np.arange(offsets[-1], dtype=np.int32) - offsets[block]
    length = -(-(hi - lo) // pieces)[block]
    part_lo = np.minimum(lo[block] + piece * length, hi[block])
    part_hi = np.minimum(part_lo + length, hi[block])
    full = [np.clip(x, part_lo, part_hi) for x in (full_lo[block], full_hi[block])]
    # 2. slots for the sums of the pieces of one block, side by side
    split = pieces > 1
    slot = _offsets(np.where(split, pieces, 0))
    slots = np.where(split[block], slot[block] + piece, -1)
    parts = np.stack([block, part_lo, *full, part_hi, slots], 1)
    parts = parts[np.argsort(part_lo - part_hi, kind="stable")]
    splits = np.stack([np.arange(len(lo)), slot[:-1], slot[1:]], 1)[split]
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
