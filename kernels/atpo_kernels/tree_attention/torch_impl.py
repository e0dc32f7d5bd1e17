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
    the last is the block's own range. Ranges hold every key that any query of the block sees. They count the prefix,
    which is the first full range if there is one: query i is key prefix + i.
    """

    prefix: int
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


def make_tree_blocks(subtree_end: Tensor, max_queries: int = 128, prefix: int = 0) -> TreeBlocks:
    """Cut a row (T,) behind a prefix into blocks for `tree_attention(impl="torch")`, once for all layers.

    Borders are chosen among turn starts and steps inside long turns so that the computed pairs plus the fixed costs
    are least. Reads subtree_end on the host. Raises ValueError if subtree_end is not that of depth-first pre-order.
    """
    end = subtree_end.detach().cpu().numpy().astype(np.int64)
    tokens = len(end)
    index = np.arange(tokens)
    if np.any(end <= index) or np.any(end > tokens):
        raise ValueError("make_tree_blocks: subtree_end[k] must lie in (k, T]")
    closed = np.cumsum(np.bincount(end, minlength=tokens + 1))
    open_before = index - closed[:tokens]  # keys before the token whose subtree holds it
    starts = _choose_starts(end, open_before + prefix, max_queries)
    root = np.maximum.accumulate(np.where(open_before == 0, index, 0))
    full, partial = [], []
    for start, stop in pairwise(starts):
        first = int(root[start])
        before, key = end[first:start], prefix + first
        full.append([(0, prefix)] * (prefix > 0) + _ranges(np.flatnonzero(before >= stop) + key))
        some = _ranges(np.flatnonzero((before > start) & (before < stop)) + key)
        partial.append([*some, (prefix + start, prefix + stop)])
    return TreeBlocks(prefix, starts, full, partial)


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
        """Score queries (Hkv, B * G, d) and keys (Hkv, K, d): (Hkv, B * G, K), -inf where a key is not visible."""
        scores = torch.bmm(q, k.transpose(1, 2))
        heads, rows, _ = scores.shape
        size = self.stop - self.start
        by_query = scores.view(heads, size, rows // size, -1)
        by_query[..., self.num_full :].add_(self.mask[:, None, :])
        return scores


def _iterate(blocks: TreeBlocks, subtree_end: Tensor, dtype: torch.dtype) -> Iterator[_Block]:
    """Go through the blocks with their masks."""
    never = torch.full((), float("-inf"), dtype=dtype, device=subtree_end.device)
    index = torch.arange(subtree_end.numel(), device=subtree_end.device, dtype=subtree_end.dtype)
    for i, (start, stop) in enumerate(pairwise(blocks.starts)):
        full, partial = blocks.full[i], blocks.partial[i]
        own = [slice(lo - blocks.prefix, hi - blocks.prefix) for lo, hi in partial]
        keys, ends = (torch.cat([x[tokens] for tokens in own]) for x in (index, subtree_end))
        query = index[start:stop, None]
        mask = torch.where((keys > query) | (ends <= query), never, 0)
        yield _Block(start, stop, full + partial, sum(hi - lo for lo, hi in full), mask)


def _heads_first(tensor: Tensor, key_heads: int, dtype: torch.dtype) -> Tensor:
    """Put heads first, contiguously: (T, Hkv * G, d) -> (Hkv, T, G, d)."""
    tokens, heads, width = tensor.shape
    grouped = tensor.reshape(tokens, key_heads, heads // key_heads, width).transpose(0, 1)
    return grouped.to(dtype).contiguous()


def _tokens_first(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Put tokens first: (Hkv, T, G, d) -> (T, Hkv * G, d)."""
    return tensor.transpose(0, 1).flatten(1, 2).to(dtype)


class _TreeAttention(torch.autograd.Function):
    """`tree_attention` block by block; the backward computes the scores of a block again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float, blocks: TreeBlocks
    ) -> Tensor:
        key_heads = k.shape[1]
        dtype = torch.promote_types(q.dtype, torch.float32)
        scaled = _heads_first(q, key_heads, dtype) * (scale * _LOG2_E)
        keys, values = (_heads_first(x, key_heads, dtype).squeeze(2) for x in (k, v))
        out = torch.empty_like(scaled)
        peaks, totals = out.new_empty(2, *out.shape[:3])
        for block in _iterate(blocks, subtree_end, dtype):
            scores = block.scores(block.rows(scaled), block.gather(keys))
            peak = scores.amax(-1, keepdim=True)
            weights = scores.sub_(peak).exp2_()
            total = weights.sum(-1, keepdim=True)
            block.rows(out).copy_(torch.bmm(weights, block.gather(values)).div_(total))
            block.rows(peaks).copy_(peak.squeeze(-1))
            block.rows(totals).copy_(total.squeeze(-1))
        result = _tokens_first(out, q.dtype)
        ctx.save_for_backward(q, k, v, subtree_end, result, peaks, totals)
        ctx.scale, ctx.blocks = scale, blocks
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with kernel_context(grad):
            return *_gradients(ctx, grad), None, None, None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v, with the weights computed again block by block."""
    q, k, v, subtree_end, result, peaks, totals = ctx.saved_tensors
    key_heads, dtype = k.shape[1], peaks.dtype
    scaled = _heads_first(q, key_heads, dtype) * (ctx.scale * _LOG2_E)
    keys, values = (_heads_first(x, key_heads, dtype).squeeze(2) for x in (k, v))
    grad, result = (_heads_first(x, key_heads, dtype) for x in (grad, result))
    grad = grad / totals[..., None]  # so that weights need not be divided by their sum
    mean = (grad * result).sum(-1)  # (Hkv, T, G)
    grad_q, grad_k, grad_v = torch.empty_like(scaled), torch.zeros_like(keys), torch.zeros_like(values)
    for block in _iterate(ctx.blocks, subtree_end, dtype):
        queries, seen, grad_rows = block.rows(scaled), block.gather(keys), block.rows(grad)
        weights = block.scores(queries, seen).sub_(block.rows(peaks)[..., None]).exp2_()
        block.scatter_add(grad_v, torch.bmm(weights.transpose(1, 2), grad_rows))
        grad_scores = torch.bmm(grad_rows, block.gather(values).transpose(1, 2))
        grad_scores.sub_(block.rows(mean)[..., None]).mul_(weights)
        block.rows(grad_q).copy_(torch.bmm(grad_scores, seen))
        block.scatter_add(grad_k, torch.bmm(grad_scores.transpose(1, 2), queries))
    grad_k, grad_v = (_tokens_first(x[:, :, None], k.dtype) for x in (grad_k.mul_(math.log(2)), grad_v))
    return _tokens_first(grad_q.mul_(ctx.scale), q.dtype), grad_k, grad_v


def tree_attention_torch(
    q: Tensor,  # (T, Hq, d)
    k: Tensor,  # (P + T, Hkv, d)
    v: Tensor,  # (P + T, Hkv, d)
    subtree_end: Tensor,  # (T,)
    scale: float,
    blocks: TreeBlocks | None,
) -> Tensor:  # (T, Hq, d)
    """Compute `tree_attention` in PyTorch; see there."""
    blocks = make_tree_blocks(subtree_end, prefix=len(k) - len(q)) if blocks is None else blocks
    if not isinstance(blocks, TreeBlocks):
        raise ValueError("tree_attention: blocks for impl='torch' are those of make_tree_blocks")
    return _TreeAttention.apply(q, k, v, subtree_end, scale, blocks)
