"""`tree_attention` block by block, over the visible keys of each block only; any device and dtype.

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

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atpo_kernels.tree_attention.blocks import TreeBlocks, make_tree_blocks

Range = tuple[int, int]
_LOG2_E = 1 / math.log(2)


def tree_attention_blockwise(
    q: Tensor,  # (T, Hq, d)
    k: Tensor,  # (P + T, Hkv, d)
    v: Tensor,  # (P + T, Hkv, d)
    subtree_end: Tensor,  # (T,)
    scale: float,
    blocks: TreeBlocks | None,
) -> Tensor:  # (T, Hq, d)
    """See `tree_attention`."""
    blocks = make_tree_blocks(subtree_end, prefix=len(k) - len(q)) if blocks is None else blocks
    if not isinstance(blocks, TreeBlocks):
        raise ValueError("tree_attention: blocks for impl='torch' are those of make_tree_blocks")
    return _Blockwise.apply(q, k, v, subtree_end, scale, blocks)


@dataclass(slots=True)
class _Block:
    """One block of queries against its keys."""

    start: int
    stop: int
    keys: list[Range]
    num_full: int  # keys at the front that every query sees
    mask: Tensor  # (B, K - num_full) of the other keys: 0, or -inf where the query may not see the key

    def rows(self, tensor: Tensor) -> Tensor:
        """(Hkv, T, G, ...) -> (Hkv, B * G, ...)"""
        return tensor[:, self.start : self.stop].flatten(1, 2)

    def gather(self, tensor: Tensor) -> Tensor:
        """(Hkv, P + T, d) -> (Hkv, K, d)"""
        parts = [tensor[:, lo:hi] for lo, hi in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def scatter_add(self, total: Tensor, part: Tensor) -> None:
        """The reverse of `gather`: (Hkv, P + T, d) += (Hkv, K, d)."""
        at = 0
        for lo, hi in self.keys:
            total[:, lo:hi] += part[:, at : at + hi - lo]
            at += hi - lo

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """(Hkv, B * G, d), (Hkv, K, d) -> (Hkv, B * G, K), -inf where not visible."""
        scores = torch.bmm(q, k.transpose(1, 2))
        heads, rows, _ = scores.shape
        size = self.stop - self.start
        by_query = scores.view(heads, size, rows // size, -1)
        by_query[..., self.num_full :].add_(self.mask[:, None, :])
        return scores


def _iterate(blocks: TreeBlocks, subtree_end: Tensor, dtype: torch.dtype) -> Iterator[_Block]:
    """The blocks, with their masks."""
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
    """(T, Hkv * G, d) -> contiguous (Hkv, T, G, d)"""
    tokens, heads, width = tensor.shape
    grouped = tensor.reshape(tokens, key_heads, heads // key_heads, width).transpose(0, 1)
    return grouped.to(dtype).contiguous()


def _tokens_first(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(Hkv, T, G, d) -> (T, Hkv * G, d)"""
    return tensor.transpose(0, 1).flatten(1, 2).to(dtype)


class _Blockwise(torch.autograd.Function):
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
        q, k, v, subtree_end, result, peaks, totals = ctx.saved_tensors
        key_heads, dtype = k.shape[1], peaks.dtype
        scaled = _heads_first(q, key_heads, dtype) * (ctx.scale * _LOG2_E)
        keys, values = (_heads_first(x, key_heads, dtype).squeeze(2) for x in (k, v))
        grad, result = (_heads_first(x, key_heads, dtype) for x in (grad, result))
        grad = grad / totals[..., None]  # so that weights need not be divided by their sum
        mean = (grad * result).sum(-1)  # (Hkv, T, G)
        by_q, by_k, by_v = torch.empty_like(scaled), torch.zeros_like(keys), torch.zeros_like(values)
        for block in _iterate(ctx.blocks, subtree_end, dtype):
            queries, seen, up = block.rows(scaled), block.gather(keys), block.rows(grad)
            weights = block.scores(queries, seen).sub_(block.rows(peaks)[..., None]).exp2_()
            block.scatter_add(by_v, torch.bmm(weights.transpose(1, 2), up))
            by_scores = torch.bmm(up, block.gather(values).transpose(1, 2))
            by_scores.sub_(block.rows(mean)[..., None]).mul_(weights)
            block.rows(by_q).copy_(torch.bmm(by_scores, seen))
            block.scatter_add(by_k, torch.bmm(by_scores.transpose(1, 2), queries))
        by_k, by_v = (_tokens_first(x[:, :, None], k.dtype) for x in (by_k.mul_(math.log(2)), by_v))
        return _tokens_first(by_q.mul_(ctx.scale), q.dtype), by_k, by_v, None, None, None
