"""`tree_attention` on Triton kernels: one forward kernel, and one over queries and one over keys for the backward.

What to expect, by arithmetic; nothing here has been measured. For P pairs of a query and a key that it sees, and Hq
query heads of d dimensions: 4 P Hq d FLOPs forward (two products), and 14 P Hq d backward (seven: both kernels compute
scores and dP, so that neither needs atomics; a single kernel would need five). A tree of 32k tokens whose paths average
4k tokens has P = 1.3e8; with Hq = 32, d = 128: 2.1 and 7.5 TFLOP a layer, 20 ms at 500 TFLOP/s. Memory traffic is q, k,
v, the output and their gradients once, some tens to hundreds of MB: under 1 ms. So the matrix units bound it. What is
lost beyond P is masked work: about half a block at either end of a run of visible tokens, with blocks of 64 keys 3-6 %
at turns of several hundred tokens. A tile of 128 rows reads a byte of keys and values from the L2 cache every 128
FLOPs; the programs of one head run side by side, so that its keys and values (16 MB at 32k tokens) stay there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atpo_kernels.tree_attention.block_lists import TreeBlockLists
from atpo_kernels.tree_attention.triton_launch import Attention
from atpo_kernels.tree_attention.triton_variants import variants

__all__ = ["tree_attention", "variants"]


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float, blocks: TreeBlockLists | None
    ) -> Tensor:
        call = Attention.prepare(q, k, v, subtree_end, scale, blocks)
        out, statistics = call.forward()
        ctx.save_for_backward(call.q, call.k, call.v, subtree_end, out, statistics)
        ctx.scale, ctx.blocks = scale, call.blocks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, subtree_end, out, statistics = ctx.saved_tensors
        call = Attention.prepare(q, k, v, subtree_end, ctx.scale, ctx.blocks)
        return *call.backward(grad, out, statistics), None, None, None


def tree_attention(
    q: Tensor,  # (T, Hq, d)
    k: Tensor,  # (P + T, Hkv, d)
    v: Tensor,  # (P + T, Hkv, d)
    subtree_end: Tensor,  # (T,)
    scale: float,
    blocks: TreeBlockLists | None,
) -> Tensor:  # (T, Hq, d)
    """See `atpo_kernels.tree_attention`."""
    return _TreeAttention.apply(q, k, v, subtree_end, scale, blocks)
