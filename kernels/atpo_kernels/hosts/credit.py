"""Advantages of turns on padded batches, for hosts that compare whole trajectories (docs/design.md#credit)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

EPSILON = 1e-6  # added to a standard deviation


@dataclass(slots=True)
class _Turn:
    """A turn of a search tree, found again as a common prefix of rows."""

    weight: float = 1.0  # exp of its mean negative log-prob, or 1
    ends: list[float] = field(default_factory=list)  # rewards of the rows that end with it
    below: dict[Hashable, _Turn] = field(default_factory=dict)

    def value(self) -> float:
        """Average the rewards of the leaves below, each choice by its weight."""
        pairs = [(self.weight, reward) for reward in self.ends]
        pairs += [(turn.weight * max(len(turn.ends), 1), turn.value()) for turn in self.below.values()]
        return sum(w * v for w, v in pairs) / sum(w for w, _ in pairs)


def tree_advantages(
    ids: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    rewards: Tensor,  # (B,)
    groups: Sequence[Hashable],  # (B,)
    logprobs: Tensor | None = None,  # (B, T)
    *,
    standardize: bool = True,
) -> Tensor:  # (B, T)
    """Compute AT2PO's advantages of turns, from rows that are the leaves of search trees.

    Rows of one group are one tree, and turns (runs of ones in `mask`) are one turn where all tokens up to their end are
    equal. `rewards` are standardised within the group (population std). The value of a turn is the mean over its
    children, weighed by the softmax of their mean negative log-prob where `logprobs` are given, else equally. It is the
    advantage of the turn's tokens; other tokens get 0. This is `assign_credit(trees, "at2po")` of atpo_fast.
    """
    z = _standardized(rewards.double(), groups, ddof=0) if standardize else rewards.double()
    roots = {group: _Turn() for group in groups}
    found = []
    for row, group in enumerate(groups):
        at = roots[group]
        for start, end in turn_spans(mask[row]):
            weight = 1.0 if logprobs is None else float((-logprobs[row, start:end].double().mean()).exp())
            at = at.below.setdefault(tuple(ids[row, :end].tolist()), _Turn(weight))
            found.append((row, start, end, at))
        at.ends.append(float(z[row]))
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for row, start, end, turn in found:
        out[row, start:end] = turn.value()
    return out.to(mask.device, rewards.dtype)


def return_advantages(
    rewards: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    groups: Sequence[Hashable],  # (B,)
    discount: float = 1.0,
) -> Tensor:  # (B, T)
    """Compute advantages of turns from rewards of turns: their returns, standardised over the turns of the group.

    A reward belongs to the last turn that began before it. The return is the discounted sum from a turn to the end of
    its row, the std that of a sample. This is `assign_credit(trees, "gtpo")` of atpo_fast.
    """
    found, returns = [], []
    for row in range(len(mask)):
        spans, total = turn_spans(mask[row]), 0.0
        for (start, end), limit in zip(
            reversed(spans), [mask.shape[1], *(s for s, _ in reversed(spans))], strict=False
        ):
            total = float(rewards[row, start:limit].double().sum()) + discount * total
            found.append((row, start, end))
            returns.append(total)
    z = _standardized(torch.tensor(returns, dtype=torch.float64), [groups[row] for row, _, _ in found], ddof=1)
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for (row, start, end), value in zip(found, z, strict=True):
        out[row, start:end] = value
    return out.to(mask.device, rewards.dtype)


def turn_spans(mask: Tensor) -> list[tuple[int, int]]:  # (T,)
    """List (start, end) of the runs of ones."""
    steps = torch.nn.functional.pad(mask.bool().int(), (1, 1)).diff()
    starts, ends = ((steps == sign).nonzero().flatten().tolist() for sign in (1, -1))
    return list(zip(starts, ends, strict=True))


def _standardized(values: Tensor, groups: Sequence[Hashable], ddof: int) -> Tensor:  # (n,) float64
    """Standardise within groups; a group of too few values for its std has mean 0 and std 1, one of equal values 0."""
    out = torch.empty_like(values)
    for group in dict.fromkeys(groups):
        at = torch.tensor([name == group for name in groups])
        mine = values[at]
        if len(mine) <= ddof:
            out[at] = mine / (1 + EPSILON)
            continue
        centred = mine - mine[0]  # equal values give exactly 0
        out[at] = (centred - centred.mean()) / (centred.std(correction=ddof) + EPSILON)
    return out
