"""Attention over packed search trees: every token sees its own path and nothing else (design, sections 5 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from atpo_kernels.dispatch import choose
from atpo_kernels.tree_attention.blocks import TreeBlocks, make_tree_blocks
from atpo_kernels.tree_attention.blockwise import tree_attention_blockwise
from atpo_kernels.tree_attention.reference import tree_attention_reference, tree_attention_sdpa

__all__ = ["TreeBlocks", "make_tree_blocks", "tree_attention"]


def tree_attention(
    q: Tensor,  # (T, Hq, d)
    k: Tensor,  # (T, Hkv, d)
    v: Tensor,  # (T, Hkv, d)
    subtree_end: Tensor,  # (T,) int32
    *,
    blocks: TreeBlocks | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:  # (T, Hq, d)
    """Attention of a row of trees, each laid out in depth-first pre-order with one copy of every token.

    Query i sees key j iff j <= i < subtree_end[j], where subtree_end[j] is the index after the last token of the
    subtree of j's turn. Trees in a row do not see one another. Query heads are grouped over key heads as usual: query
    head h reads key head h // (Hq / Hkv). `scale` defaults to 1/sqrt(d). Output in the dtype of q; scores and softmax
    of half-precision inputs are float32 ("torch", "triton"). Differentiable in q, k and v; T = 0 is allowed.

    `impl`: "auto" (Triton on CUDA where built, else "torch"), "torch" (visits the visible keys of each block of
    queries; `blocks = make_tree_blocks(subtree_end)`, made here if not given, serves all layers and steps of a row),
    "sdpa" (scaled_dot_product_attention with the dense (T, T) mask), "reference" (the definition), "triton".

    Raises ValueError for shapes, dtypes or devices that do not fit, or blocks of another row.
    """
    _check(q, k, v, subtree_end, blocks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    paths = {
        "torch": tree_attention_blockwise,
        "sdpa": tree_attention_sdpa,
        "reference": tree_attention_reference,
    }
    return choose("tree_attention", impl, q.device, paths)(q, k, v, subtree_end, scale, blocks)


def _check(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, blocks: TreeBlocks | None) -> None:
    tokens = q.shape[0]
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, subtree_end {tuple(subtree_end.shape)}"
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or k.shape[0] != tokens or k.shape[2] != q.shape[2]:
        raise ValueError(f"tree_attention: q must be (T, Hq, d), k and v (T, Hkv, d), got {shapes}")
    if q.shape[1] == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"tree_attention: the query heads must be a multiple of the key heads, got {shapes}")
    if subtree_end.shape != (tokens,) or subtree_end.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tree_attention: subtree_end must be ({tokens},) int32, got {subtree_end.dtype}, {shapes}")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"tree_attention: q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if len({x.device for x in (q, k, v, subtree_end)}) != 1:
        raise ValueError("tree_attention: q, k, v and subtree_end must be on one device")
    if blocks is not None and blocks.starts[-1] != tokens:
        raise ValueError(f"tree_attention: blocks are of a row of {blocks.starts[-1]} tokens, but there are {tokens}")
