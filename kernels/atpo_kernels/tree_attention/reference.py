"""Definition of `tree_attention` in plain PyTorch, with the dense (T, P + T) mask.

Tests and benches compare with it; its gradients are those of autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """Options of one call that are numbers.

    Raises ValueError for a scale or softcap that is not positive, and for a window below 1.
    """

    scale: float
    """Factor of the products of queries and keys."""
    window: int | None = None
    """Query and key must lie less than this apart on their path; None: no limit."""
    softcap: float | None = None
    """Bound of the scores, softcap * tanh(score / softcap); None: no bound."""

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"tree_attention: scale must be positive, got {self.scale}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"tree_attention: window must be at least 1, got {self.window}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"tree_attention: softcap must be positive, got {self.softcap}")


def key_ends(subtree_end: Tensor, prefix: int) -> Tensor:  # (T,) -> (P + T,)
    """Give every key its subtree_end, counted as queries; the subtree of a prefix is all of the row."""
    return F.pad(subtree_end, (prefix, 0), value=len(subtree_end)) if prefix else subtree_end


def key_positions(subtree_end: Tensor, prefix: int) -> Tensor:  # (T,) -> (P + T,) int32
    """Compute the position of every key on its path: of token i, the prefix and the tokens before i that i sees.

    In pre-order those are all tokens before i but those whose subtree has ended. Waits for no device.
    """
    tokens, end = len(subtree_end), subtree_end.long()
    ended = torch.zeros(tokens + 1, dtype=torch.int32, device=end.device)
    ended.scatter_add_(0, end, torch.ones_like(end, dtype=torch.int32))
    index = torch.arange(prefix + tokens, dtype=torch.int32, device=end.device)
    index[prefix:] -= ended.cumsum(0)[:tokens].int()
    return index


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
