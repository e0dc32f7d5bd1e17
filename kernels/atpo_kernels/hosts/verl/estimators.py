"""Advantage estimators with verl's signature: they see rewards, mask and question ids, but no token ids."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from atpo_kernels.hosts.credit import return_advantages, turn_spans


def turn_estimator(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:  # (B, T) each
    """Compute advantages from rewards of turns: standardised returns, discounted by algorithm.gamma."""
    discount = 1.0 if config is None else config.gamma
    found = return_advantages(token_level_rewards, response_mask, list(index), discount)
    return found, found


def tree_estimator(token_level_rewards: Tensor, response_mask: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """Take the rewards of turns as their advantages: an agent loop that searched a tree has computed them.

    verl hands no token ids to an estimator, so the tree is not known here. `credit.tree_advantages` computes the values
    from the rows of a tree; write each at the last token of its turn (`rm_scores`).
    """
    found = token_level_rewards.new_zeros(response_mask.shape)
    for row, mask in enumerate(response_mask):
        for start, end in turn_spans(mask):
            found[row, start:end] = token_level_rewards[row, start:end].sum()
    return found, found
