"""Definition of `tree_attention` in plain PyTorch, with the dense (T, P + T) mask.

Tests and benches compare with it; its gradients are those of autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from atpo_kernels.tree_attention.options import AttentionOptions


def tree_mask(subtree_end: Tensor, prefix: int, window: int | None = None) -> Tensor:  # (T,) -> (T, P + T) bool
    """Mark at [q, k] whether query q sees key k; key P + j is token j of the row, seen if j <= q < subtree_end[j].

    With a window only the last `window` of those keys are seen: in pre-order they are the nearest on the path.
    """
    index = torch.arange(subtree_end.numel(), device=subtree_end.device)
    own = (index[None, :] <= index[:, None]) & (index[:, None] < subtree_end[None, :])
    mask = F.pad(own, (prefix, 0), value=True)
    if window is None:
        return mask
    place = mask.sum(1, keepdim=True) - mask.cumsum(1)  # [q, k]: how many of the keys that q sees come after k
    return mask & (place < window)


def tree_attention_reference(
    q: Tensor,  # (T, Hq, d)
    k: Tensor,  # (P + T, Hkv, d)
    v: Tensor,  # (P + T, Hkv, d)
    sinks: Tensor | None,  # (Hq,)
    subtree_end: Tensor,  # (T,)
    options: AttentionOptions,
    blocks: None = None,
) -> Tensor:  # (T, Hq, d)
    """Attend by plain matrix products and softmax; there are no blocks."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~tree_mask(subtree_end, len(k) - len(q), options.window), float("-inf"))
    if sinks is None:
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    beside = sinks.to(scores.dtype)[:, None, None].expand(-1, len(q), 1)
    return torch.einsum("hqk,khd->qhd", torch.cat([scores, beside], -1).softmax(-1)[..., :-1], v)
