"""Definition of `tree_attention` in plain PyTorch, with the dense (T, P + T) mask.

Tests and benches compare with it; its gradients are those of autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def tree_mask(subtree_end: Tensor, prefix: int) -> Tensor:  # (T,) -> (T, P + T) bool
    """Mark at [q, k] whether query q sees key k; key P + j is token j of the row, seen if j <= q < subtree_end[j]."""
    index = torch.arange(subtree_end.numel(), device=subtree_end.device)
    own = (index[None, :] <= index[:, None]) & (index[:, None] < subtree_end[None, :])
    return F.pad(own, (prefix, 0), value=True)


def tree_attention_reference(
    q: Tensor,  # (T, Hq, d)
    k: Tensor,  # (P + T, Hkv, d)
    v: Tensor,  # (P + T, Hkv, d)
    subtree_end: Tensor,  # (T,)
    scale: float,
    blocks: None = None,
) -> Tensor:  # (T, Hq, d)
    """Attend by plain matrix products and softmax; there are no blocks."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~tree_mask(subtree_end, len(k) - len(q)), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
