"""Definition of `tree_attention` with the dense (T, T) mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from atpo_kernels.tree_attention.blocks import TreeBlocks


def tree_mask(subtree_end: Tensor) -> Tensor:  # (T,) -> (T, T) bool
    """[q, k]: whether query q sees key k, that is k <= q < subtree_end[k]."""
    index = torch.arange(subtree_end.numel(), device=subtree_end.device)
    return (index[None, :] <= index[:, None]) & (index[:, None] < subtree_end[None, :])


def tree_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float, blocks: TreeBlocks | None
) -> Tensor:
    """(T, Hq, d); plain matrix products and softmax."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~tree_mask(subtree_end), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def tree_attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float, blocks: TreeBlocks | None
) -> Tensor:
    """(T, Hq, d); one scaled_dot_product_attention with the dense mask."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    mask = tree_mask(subtree_end)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)
