"""What `tree_attention` does with a score, and how far a query sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    return torch.nn.functional.pad(subtree_end, (prefix, 0), value=len(subtree_end)) if prefix else subtree_end


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
