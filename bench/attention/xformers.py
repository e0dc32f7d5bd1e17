"""Attention over flat rows, whose trees do not branch, by xformers: what a flat trainer runs. CUDA only."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def sequence_lengths(subtree_end: Tensor) -> list[int]:  # (T,)
    """Find the lengths of the sequences of a flat row, on the host. Raises ValueError if a tree branches."""
    end = subtree_end.detach().cpu().numpy()
    bounds = np.unique(end)
    lengths = np.diff(bounds, prepend=0)
    if not np.array_equal(np.repeat(bounds, lengths), end):
        raise ValueError("tree_attention_xformers takes flat rows only, but a tree of this row branches")
    return lengths.tolist()


def tree_attention_xformers(
    q: Tensor,  # (T, Hq, d)
    k: Tensor,  # (T, Hkv, d)
    v: Tensor,  # (T, Hkv, d)
    subtree_end: Tensor,  # (T,)
    *,
    blocks: Any | None = None,
    scale: float | None = None,
) -> Tensor:  # (T, Hq, d)
    """Compute `tree_attention` of a flat row; `blocks` is its BlockDiagonalCausalMask.

    Raises ValueError for a row with branches or a prefix, RuntimeError without the package xformers or a GPU.
    """
    if len(k) != len(q):
        raise ValueError(f"tree_attention_xformers takes rows without a prefix, here {len(k) - len(q)} tokens")
    lengths = sequence_lengths(subtree_end) if blocks is None else None
    try:
        from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask  # type: ignore[import-not-found]
    except ImportError as error:
        raise RuntimeError("tree_attention_xformers needs the package xformers") from error
    if q.device.type != "cuda":
        raise RuntimeError("tree_attention_xformers needs CUDA tensors")
    tokens, heads, width = q.shape
    key_heads = k.shape[1]
    if tokens == 0:
        return q * 1.0
    mask = BlockDiagonalCausalMask.from_seqlens(lengths) if lengths is not None else blocks
    grouped = (1, tokens, key_heads, heads // key_heads, width)
    keys, values = (x[None, :, :, None].expand(grouped) for x in (k, v))
    return memory_efficient_attention(q.view(grouped), keys, values, attn_bias=mask, scale=scale).view(q.shape)
