"""AEPO's entropy-aware advantages, on packed rows (docs/design.md#further-terms; arXiv:2510.14545)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from atpo_fast.objective import Objective
from atpo_fast.tree.packed_rows import PackedTrees


def apply_entropy_advantage(
    rows: Sequence[PackedTrees],
    entropies: Sequence[Tensor],
    objective: Objective,
    *,
    all_reduce: Callable[[Tensor], Tensor] = lambda moments: moments,
) -> list[PackedTrees]:
    """Multiply the rows' advantages by `1 + c * (H_t - mean H) / std H`, c = `objective.entropy_advantage`.

    Mean and sample std run over the action tokens of all trajectories of the batch. A negative factor swaps W+ and W-,
    so that the sign of the new advantage decides about clip and dual cap.

    Args:
        rows: the rows of this rank.
        entropies: (A,) entropy of the policy at each action token of each row.
        objective: its `entropy_advantage` is c; 0 returns the rows unchanged.
        all_reduce: sums a float64 tensor over the ranks that hold the rest of the batch.
    """
    if objective.entropy_advantage == 0:
        return list(rows)
    mean, std = _mean_std(rows, entropies, all_reduce)
    return [
        _scaled(row, 1 + objective.entropy_advantage * (h.detach() - mean) / std)
        for row, h in zip(rows, entropies, strict=True)
    ]


def _mean_std(
    rows: Sequence[PackedTrees], entropies: Sequence[Tensor], all_reduce: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """Compute mean and sample std over flat tokens, in two passes; a std of 0 counts as 1."""
    device = rows[0].targets.device if rows else torch.device("cpu")
    pairs = [(row.trajectory_count.double(), h.detach().double()) for row, h in zip(rows, entropies, strict=True)]
    first = torch.zeros(2, dtype=torch.float64, device=device)
    for count, h in pairs:
        first += torch.stack([count.sum(), (count * h).sum()])
    tokens, total = all_reduce(first).tolist()
    mean = total / max(tokens, 1.0)
    second = torch.zeros(1, dtype=torch.float64, device=device)
    for count, h in pairs:
        second += (count * (h - mean) ** 2).sum()
    std = (all_reduce(second).item() / max(tokens - 1.0, 1.0)) ** 0.5
    return mean, std or 1.0


def _scaled(row: PackedTrees, factor: Tensor) -> PackedTrees:
    """Multiply the advantages of a row by `factor`, (A,)."""
    size, keep = factor.abs().to(row.weight_pos.dtype), factor >= 0
    pos, neg = row.weight_pos * size, row.weight_neg * size
    return replace(row, weight_pos=torch.where(keep, pos, neg), weight_neg=torch.where(keep, neg, pos))
