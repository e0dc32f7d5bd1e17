"""Attention over a row of trees by PyTorch's scaled_dot_product_attention with the dense (T, P + T) mask."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from atpo_kernels.tree_attention.reference import tree_mask


def tree_attention_sdpa(
    q: Tensor,  # (T, Hq, d)
    k: Tensor,  # (P + T, Hkv, d)
    v: Tensor,  # (P + T, Hkv, d)
    subtree_end: Tensor,  # (T,)
    *,
    blocks: Tensor | None = None,  # (T, P + T) bool
    scale: float | None = None,
) -> Tensor:  # (T, Hq, d)
    """Compute `tree_attention` with one dense mask; `blocks` is the mask of the row and prefix."""
    mask = tree_mask(subtree_end, len(k) - len(q)) if blocks is None else blocks
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)
