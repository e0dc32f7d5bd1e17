"""Rows of random trees, and tensors to attend over, for the tests of tree_attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from atpo_kernels import tree_attention


def random_row(tokens: int, turn: int, seed: int) -> Tensor:
    """subtree_end (T,) of random trees in pre-order with turns of up to `turn` tokens."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    depths = [0]
    while sum(lengths) < tokens:
        lengths.append(int(rng.integers(1, turn + 1)))
        # one deeper (a child), the same or less deep (a sibling of it or of an ancestor), 0: a new tree
        depths.append(int(rng.integers(0, depths[-1] + 2)))
    lengths[-1] -= sum(lengths) - tokens
    return row_of(lengths, depths[:-1])


def row_of(lengths: list[int], depths: list[int]) -> Tensor:
    """subtree_end (T,) of turns in pre-order, by their lengths and depths in the tree; depth 0 begins a tree."""
    starts = np.cumsum([0, *lengths])
    end = np.empty(starts[-1], dtype=np.int32)
    for i, depth in enumerate(depths):
        after = next((j for j in range(i + 1, len(depths)) if depths[j] <= depth), len(depths))
        end[starts[i] : starts[i + 1]] = starts[after]
    return torch.from_numpy(end)


def behind_root(end: Tensor, prefix: int) -> Tensor:  # (T,) -> (P + T,)
    """subtree_end of the row that a row and the prefix before it are together: the prefix is the turn of a root."""
    return torch.cat([torch.full((prefix,), prefix + len(end), dtype=end.dtype), end + prefix])


def tree_mask(end: Tensor, prefix: int = 0, window: int | None = None) -> Tensor:  # (T,) -> (T, P + T) bool
    """[q, k]: whether query q sees key k, by the definition: of a path's keys, counted from its end, the window's."""
    whole = behind_root(end, prefix)
    index = torch.arange(len(whole))
    mask = (index[None] <= index[:, None]) & (index[:, None] < whole[None])
    if window is not None:
        mask &= mask.flip(1).cumsum(1).flip(1) <= window
    return mask[prefix:]


def seen_pairs(end: Tensor, prefix: int, queries: int, keys: int, window: int | None = None) -> np.ndarray:
    """(query blocks, key blocks) number of visible pairs in each."""
    mask = tree_mask(end, prefix, window).numpy().astype(int)
    by_query = np.add.reduceat(mask, np.arange(0, mask.shape[0], queries), 0)
    return np.add.reduceat(by_query, np.arange(0, mask.shape[1], keys), 1)


def inputs(
    tokens: int,
    heads: tuple[int, int],
    width: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    prefix: int = 0,
) -> list[Tensor]:
    """q, k, v to differentiate, and an upstream gradient; k and v have `prefix` tokens more."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads[0], width), *[(prefix + tokens, heads[1], width)] * 2, (tokens, heads[0], width)]
    made = [torch.randn(s, generator=rng, dtype=torch.float64).to(device, dtype) for s in shapes]
    return [x.requires_grad_() for x in made[:3]] + made[3:]


def forward_backward(tensors: list[Tensor], end: Tensor, **options: Any) -> list[Tensor]:
    """Output and gradients of q, k and v, and of the sinks where `options` has them; detached."""
    q, k, v = tensors[:3]
    sinks = options.get("sinks")
    out = tree_attention(q, k, v, end, **options)
    leaves = [*tensors[:3], *([] if sinks is None else [sinks])]
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3].to(out.dtype))]
