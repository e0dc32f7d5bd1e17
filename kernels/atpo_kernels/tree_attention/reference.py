"""Definition of `tree_attention` with the dense (T, P + T) mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from atpo_kernels.tree_attention.blocks import TreeBlocks


def tree_mask(subtree_end: Tensor, prefix: int) -> Tensor:  # (T,) -> (T, P + T) bool
    """[q, k]: whether query q sees key k; key P + j is token j of the row, seen if j <= q < subtree_end[j]."""
    index = torch.arange(subtree_end.numel(), device=subtree_end.device)
    own = (index[None, :] <= index[:, None]) & (index[:, None] < subtree_end[None, :])
    return F.pad(own, (prefix, 0), value=True)


def tree_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float, blocks: TreeBlocks | None
) -> Tensor:
    """(T, Hq, d); plain matrix products and softmax."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~tree_mask(subtree_end, len(k) - len(q)), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def tree_attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float, blocks: TreeBlocks | None
) -> Tensor:
    """(T, Hq, d); one scaled_dot_product_attention with the dense mask."""
    mask = tree_mask(subtree_end, len(k) - len(q))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)
