"""`tree_attention` in PyTorch: block by block, over the visible keys of each block only; any device and dtype.

Inside, heads come first: q is (Hkv, T, G, d) with G = Hq / Hkv, and keys are (Hkv, P + T, d), so that a block's queries
of one key head are the rows of one matrix, (Hkv, B * G, d). Scores of one block exist at a time, in the backward too.
Scores are kept in base 2, as exp2 is several times faster than exp on CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atpo_kernels.devices import kernel_context
from atpo_kernels.tree_attention.reference import AttentionOptions, key_ends, key_positions

Range = tuple[int, int]
_LOG2_E = 1 / math.log(2)
# Cost of a block of B queries and K keys in units of one (query, key) pair, fitted on CPU to trees of 8-600 token
# turns: a fixed part for the calls, and a part per row and column for small matrix products and copies.
_CALL_COST = 3000
_EDGE_COST = 32
_GRID = 32  # a turn longer than this may be cut at its multiples


@dataclass(slots=True, frozen=True)
class TreeBlocks:
    """Blocks of consecutive queries of one row; block i holds queries [starts[i], starts[i+1]).

    Its keys are the ranges `full[i]`, seen by every query of the block, and then `partial[i]`, seen by some, of which
    the last is the block's own range. Ranges hold every key that any query of the block sees. They count the prefix:
    query i is key prefix + i. `window` is that of the attention they are for.
    """

    prefix: int
    window: int | None
    starts: list[int]
    full: list[list[tuple[int, int]]]
    partial: list[list[tuple[int, int]]]

    @property
    def tokens(self) -> int:
        """Number of tokens of the row."""
        return self.starts[-1]

    @property
    def pairs(self) -> int:
        """Number of (query, key) pairs that are computed."""
        sizes = np.diff(self.starts)
        keys = [sum(hi - lo for lo, hi in f + p) for f, p in zip(self.full, self.partial, strict=True)]
        return int((sizes * keys).sum())


def make_tree_blocks(
    subtree_end: Tensor,  # (T,)
    max_queries: int = 128,
    prefix: int = 0,
    window: int | None = None,
) -> TreeBlocks:
    """Cut a row behind a prefix into blocks for `tree_attention(impl="torch")`, once for all layers with this window.

    Borders are chosen among turn starts and steps inside long turns so that the computed pairs plus the fixed costs
    are least. Reads subtree_end on the host. Raises ValueError if subtree_end is not that of depth-first pre-order.
    """
    on_host = subtree_end.detach().cpu()
    end = on_host.numpy().astype(np.int64)
    tokens = len(end)
    index = np.arange(tokens)
    if np.any(end <= index) or np.any(end > tokens):
        raise ValueError("make_tree_blocks: subtree_end[k] must lie in (k, T]")
    position = key_positions(on_host, prefix).numpy().astype(np.int64)
    reach = prefix + tokens if window is None else window
    starts = _choose_starts(end, np.minimum(position[prefix:], reach - 1), max_queries)
    first_seen = np.maximum.accumulate(np.where(position[prefix:] == prefix, index, 0)) if tokens else index
    full, partial = [], []
    for start, stop in pairwise(starts):
        first = int(first_seen[start])
        nearest = np.minimum.accumulate(position[prefix + start : prefix + stop])  # of the queries up to each
        farthest = int(position[prefix + start : prefix + stop].max())
        # 1. of the prefix, key j at position j
        some, every = (min(max(0, x - reach + 1), prefix) for x in (int(nearest[-1]), farthest))
        # 2. of the tree, keys that lie before the block
        before, place = end[first:start], position[prefix + first : prefix + start]
        open_ = before > start
        seen = open_ & (nearest[np.where(open_, np.minimum(before, stop), stop) - start - 1] - place < reach)
        whole = seen & (before >= stop) & (farthest - place < reach)
        key = np.arange(prefix + first, prefix + start)
        full.append([*_span(every, prefix), *_ranges(key[whole])])
        partial.append([*_span(some, every), *_ranges(key[seen & ~whole]), (prefix + start, prefix + stop)])
    return TreeBlocks(prefix, window, starts, full, partial)


def _choose_starts(end: np.ndarray, keys_before: np.ndarray, max_queries: int) -> list[int]:
    """Choose the borders of least cost, by dynamic programming from left to right over the possible ones."""
    borders = _possible_borders(end, min(_GRID, max_queries))
    reach = np.searchsorted(borders, borders - max_queries, side="left")
    cost = np.zeros(len(borders))
    previous = np.zeros(len(borders), dtype=np.int64)
    edged = np.append(keys_before, 0)[borders] + _EDGE_COST
    for j in range(1, len(borders)):
        left = int(reach[j])
        sizes = borders[j] - borders[left:j]
        total = cost[left:j] + (sizes + _EDGE_COST) * (sizes + edged[left:j])
        best = int(total.argmin())
        cost[j], previous[j] = total[best] + _CALL_COST, left + best
    chosen = [len(borders) - 1]
    while chosen[-1] > 0:
        chosen.append(int(previous[chosen[-1]]))
    return borders[chosen[::-1]].tolist()


def _possible_borders(end: np.ndarray, grid: int) -> np.ndarray:
    """List the possible borders: 0, T, the starts of turns, and every `grid` tokens inside a turn."""
    if len(end) == 0:
        return np.zeros(1, dtype=np.int64)
    turns = np.flatnonzero(np.diff(end, prepend=-1) != 0)
    since_start = np.arange(len(end)) - np.repeat(turns, np.diff(turns, append=len(end)))
    return np.append(np.flatnonzero(since_start % grid == 0), len(end))


def _span(first: int, last: int) -> list[Range]:
    """Make the list of one range, or of none if it is empty."""
    return [(first, last)] if first < last else []


def _ranges(indices: np.ndarray) -> list[tuple[int, int]]:
    """Turn increasing indices into (first, after last) of their runs."""
    if len(indices) == 0:
        return []
    cuts = np.flatnonzero(np.diff(indices) > 1)
    first = indices[np.concatenate([[0], cuts + 1])]
    last = indices[np.concatenate([cuts, [len(indices) - 1]])] + 1
    return list(zip(first.tolist(), last.tolist(), strict=True))


@dataclass(slots=True)
class _Block:
    """A block of queries with the ranges of the keys that some of them see."""

    start: int
    stop: int
    keys: list[Range]
    num_full: int  # keys at the front that every query sees
    mask: Tensor  # (B, K - num_full) of the other keys: 0, or -inf where the query may not see the key

    def rows(self, tensor: Tensor) -> Tensor:
        """Cut out the block's queries: (Hkv, T, G, ...) -> (Hkv, B * G, ...)."""
        return tensor[:, self.start : self.stop].flatten(1, 2)

    def gather(self, tensor: Tensor) -> Tensor:
        """Collect the block's keys: (Hkv, P + T, d) -> (Hkv, K, d)."""
        parts = [tensor[:, lo:hi] for lo, hi in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def scatter_add(self, total: Tensor, part: Tensor) -> None:
        """Add to the block's keys, the reverse of `gather`: (Hkv, P + T, d) += (Hkv, K, d)."""
        at = 0
        for lo, hi in self.keys:
            total[:, lo:hi] += part[:, at : at + hi - lo]
            at += hi - lo

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Multiply queries (Hkv, B * G, d) and keys (Hkv, K, d): (Hkv, B * G, K)."""
        return torch.bmm(q, k.transpose(1, 2))

    def hide(self, scores: Tensor) -> Tensor:
        """Set the scores (Hkv, B * G, K) of keys that are not visible to -inf, in place."""
        heads, rows, _ = scores.shape
        size = self.stop - self.start
        by_query = scores.view(heads, size, rows // size, -1)
        by_query[..., self.num_full :].add_(self.mask[:, None, :])
        return scores


def _iterate(blocks: TreeBlocks, subtree_end: Tensor, dtype: torch.dtype) -> Iterator[_Block]:
    """Go through the blocks with their masks."""
    never = torch.full((), float("-inf"), dtype=dtype, device=subtree_end.device)
    prefix, end = blocks.prefix, key_ends(subtree_end, blocks.prefix)
    index = torch.arange(-prefix, len(subtree_end), device=end.device, dtype=end.dtype)  # of keys, as queries
    window = blocks.window
    position = None if window is None else key_positions(subtree_end, prefix)
    for i, (start, stop) in enumerate(pairwise(blocks.starts)):
        full, partial = blocks.full[i], blocks.partial[i]
        own = [slice(lo, hi) for lo, hi in partial]
        keys, ends = (torch.cat([x[tokens] for tokens in own]) for x in (index, end))
        query = index[prefix + start : prefix + stop, None]
        hidden = (keys > query) | (ends <= query)
        if position is not None and window is not None:
            distance = position[prefix + start : prefix + stop, None] - torch.cat([position[x] for x in own])
            hidden |= distance >= window
        mask = torch.where(hidden, never, 0)
        yield _Block(start, stop, full + partial, sum(hi - lo for lo, hi in full), mask)


def _heads_first(tensor: Tensor, key_heads: int, dtype: torch.dtype) -> Tensor:
    """Put heads first, contiguously: (T, Hkv * G, d) -> (Hkv, T, G, d)."""
    tokens, heads, width = tensor.shape
    grouped = tensor.reshape(tokens, key_heads, heads // key_heads, width).transpose(0, 1)
    return grouped.to(dtype).contiguous()


def _tokens_first(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Put tokens first: (Hkv, T, G, d) -> (T, Hkv * G, d)."""
    return tensor.transpose(0, 1).flatten(1, 2).to(dtype)


class _Scores:
    """How products of queries and keys become scores in base 2: q is multiplied by `factor` before the product."""

    def __init__(self, options: AttentionOptions):
        self.softcap = options.softcap
        self.factor = options.scale * _LOG2_E if options.softcap is None else options.scale / options.softcap

    def of(self, products: Tensor) -> Tensor:
        """Turn products into scores, in place."""
        return products if self.softcap is None else products.tanh_().mul_(self.softcap * _LOG2_E)

    def differentiate(self, grad_scores: Tensor, scores: Tensor) -> None:
        """Turn the gradient of natural scores into that of scale * q . k, in place; `scores` are those of `of`."""
        if self.softcap is not None:
            grad_scores.mul_(1 - (scores / (self.softcap * _LOG2_E)).square())


def _sinks_base_2(sinks: Tensor | None, key_heads: int, dtype: torch.dtype) -> Tensor | None:  # (Hq,) -> (Hkv, 1, G)
    return None if sinks is None else sinks.to(dtype).view(key_heads, 1, -1) * _LOG2_E


class _TreeAttention(torch.autograd.Function):
    """`tree_attention` block by block; the backward computes the scores of a block again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        subtree_end: Tensor,
        options: AttentionOptions,
        blocks: TreeBlocks,
    ) -> Tensor:
        key_heads, scoring = k.shape[1], _Scores(options)
        dtype = torch.promote_types(q.dtype, torch.float32)
        scaled = _heads_first(q, key_heads, dtype) * scoring.factor
        keys, values = (_heads_first(x, key_heads, dtype).squeeze(2) for x in (k, v))
        beside = _sinks_base_2(sinks, key_heads, dtype)
        out = torch.empty_like(scaled)
        peaks, totals = out.new_empty(2, *out.shape[:3])
        for block in _iterate(blocks, subtree_end, dtype):
            scores = block.hide(scoring.of(block.scores(block.rows(scaled), block.gather(keys))))
            peak = scores.amax(-1, keepdim=True)
            if beside is not None:
                sink = beside.expand(-1, block.stop - block.start, -1).flatten(1)[..., None]
                peak = torch.maximum(peak, sink)
            weights = scores.sub_(peak).exp2_()
            total = weights.sum(-1, keepdim=True)
            if beside is not None:
                total += (sink - peak).exp2_()
            block.rows(out).copy_(torch.bmm(weights, block.gather(values)).div_(total))
            block.rows(peaks).copy_(peak.squeeze(-1))
            block.rows(totals).copy_(total.squeeze(-1))
        result = _tokens_first(out, q.dtype)
        ctx.save_for_backward(q, k, v, sinks, subtree_end, result, peaks, totals)
        ctx.options, ctx.blocks = options, blocks
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with kernel_context(grad):
            return *_gradients(ctx, grad), None, None, None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the gradients of q, k, v and the sinks, with the weights computed again block by block."""
    q, k, v, sinks, subtree_end, result, peaks, totals = ctx.saved_tensors
    key_heads, dtype, scoring = k.shape[1], peaks.dtype, _Scores(ctx.options)
    scaled = _heads_first(q, key_heads, dtype) * scoring.factor
    keys, values = (_heads_first(x, key_heads, dtype).squeeze(2) for x in (k, v))
    grad, result = (_heads_first(x, key_heads, dtype) for x in (grad, result))
    grad = grad / totals[..., None]  # so that weights need not be divided by their sum
    mean = (grad * result).sum(-1)  # (Hkv, T, G)
    grad_q, grad_k, grad_v = torch.empty_like(scaled), torch.zeros_like(keys), torch.zeros_like(values)
    for block in _iterate(ctx.blocks, subtree_end, dtype):
        queries, seen, grad_rows = block.rows(scaled), block.gather(keys), block.rows(grad)
        scores = scoring.of(block.scores(queries, seen))
        hidden = block.hide(scores if scoring.softcap is None else scores.clone())
        weights = hidden.sub_(block.rows(peaks)[..., None]).exp2_()
        block.scatter_add(grad_v, torch.bmm(weights.transpose(1, 2), grad_rows))
        grad_scores = torch.bmm(grad_rows, block.gather(values).transpose(1, 2))
        grad_scores.sub_(block.rows(mean)[..., None]).mul_(weights)
        scoring.differentiate(grad_scores, scores)
        block.rows(grad_q).copy_(torch.bmm(grad_scores, seen))
        block.scatter_add(grad_k, torch.bmm(grad_scores.transpose(1, 2), queries))
    grad_k.mul_(ctx.options.scale / scoring.factor)
    grad_k, grad_v = (_tokens_first(x[:, :, None], k.dtype) for x in (grad_k, grad_v))
    return _tokens_first(grad_q.mul_(ctx.options.scale), q.dtype), grad_k, grad_v, _sink_gradient(sinks, peaks, mean)


def _sink_gradient(sinks: Tensor | None, peaks: Tensor, mean: Tensor) -> Tensor | None:  # (Hkv, T, G) -> (Hq,)
    """Sum -weight * mean over the queries: a sink has the value 0."""
    beside = _sinks_base_2(sinks, peaks.shape[0], peaks.dtype)
    if sinks is None or beside is None:
        return None
    return -((beside - peaks).exp2_() * mean).sum(1).flatten().to(sinks.dtype)


def tree_attention_torch(
    q: Tensor,  # (T, Hq, d)
    k: Tensor,  # (P + T, Hkv, d)
    v: Tensor,  # (P + T, Hkv, d)
    sinks: Tensor | None,  # (Hq,)
    subtree_end: Tensor,  # (T,)
    options: AttentionOptions,
    blocks: TreeBlocks | None,
) -> Tensor:  # (T, Hq, d)
    """Compute `tree_attention` in PyTorch; see there."""
    if blocks is None:
        blocks = make_tree_blocks(subtree_end, prefix=len(k) - len(q), window=options.window)
    if not isinstance(blocks, TreeBlocks):
        raise ValueError("tree_attention: blocks for impl='torch' are those of make_tree_blocks")
    return _TreeAttention.apply(q, k, v, sinks, subtree_end, options, blocks)
