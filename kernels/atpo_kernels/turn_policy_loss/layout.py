"""The arguments of the policy loss, and the way from them to a line of tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from atpo_kernels.records import LeafPaths, LossConfig, Reduction, TokenWeights
from atpo_kernels.turn_policy_loss.tokens import (
    LossTokens,
    packed_shares,
    packed_tokens,
    padded_shares,
    padded_tokens,
    token_weights_from_advantages,
    turns_from_ids,
    turns_from_mask,
)


class Structure(NamedTuple):
    """Which tokens count, and which form a turn and a trajectory."""

    turn_offsets: Tensor | None  # (N+1,); None: a padded batch
    mask: Tensor | None = None
    turn_ids: Tensor | None = None
    paths: LeafPaths | None = None


class Aggregation(NamedTuple):
    """How tokens are averaged."""

    reduction: Reduction
    max_length: int | None = None
    denominator: float | Tensor | None = None


@dataclass(slots=True)
class LossInputs:
    """The per-token tensors of one call, of one shape."""

    logprob: Tensor
    old_logprob: Tensor | None  # None: the current log-probs, without gradient
    ref_logprob: Tensor | None
    rollout_logprob: Tensor | None
    entropy: Tensor | None

    def named(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """Detached and cast."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: None if x is None else x.detach().to(dtype) for name, x in values}


@dataclass(slots=True, frozen=True)
class LossArguments:
    """One call of `turn_policy_loss`, as its caller wrote it: what every implementation starts from."""

    inputs: LossInputs
    advantages: Tensor | None  # packed: (N,) or (A,); padded: (B,) or (B, T)
    weights: TokenWeights | None  # in place of advantages
    structure: Structure
    aggregation: Aggregation
    config: LossConfig

    @property
    def by_token(self) -> bool:
        """Whether the loss is wanted by token instead of summed."""
        return self.aggregation.reduction == "none"

    @property
    def padded_shape(self) -> tuple[int, int]:
        """(B, T) of a padded batch; a 1-D tensor is one row."""
        shape = self.inputs.logprob.shape
        return (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])


def loss_tokens(arguments: LossArguments) -> LossTokens:
    """Lay out checked arguments."""
    inputs, advantages, weights = arguments.inputs, arguments.advantages, arguments.weights
    turn_offsets, mask, turn_ids, paths = arguments.structure
    dtype = torch.float64 if inputs.logprob.dtype == torch.float64 else torch.float32
    valid = None if mask is None else mask.detach().bool()
    named = inputs.named(dtype)
    if inputs.old_logprob is None:
        named["old_logprob"] = named["logprob"]
    if turn_offsets is not None:
        if weights is None:
            assert advantages is not None
            weights = _packed_weights(advantages, turn_offsets, valid, inputs.logprob.to(dtype), arguments.aggregation)
        return packed_tokens(named, weights, turn_offsets, paths, valid, arguments.config)
    shape = arguments.padded_shape
    valid = torch.ones(shape, dtype=torch.bool, device=inputs.logprob.device) if valid is None else valid.view(shape)
    turn = turns_from_mask(valid) if turn_ids is None else turns_from_ids(turn_ids.reshape(shape), valid)
    if weights is None:
        assert advantages is not None
        advantages = advantages.detach().to(dtype)
        advantages = advantages.reshape(shape) if advantages.shape == inputs.logprob.shape else advantages.view(-1, 1)
        share = padded_shares(valid, turn, *arguments.aggregation, dtype)
        weights = token_weights_from_advantages(torch.where(valid, advantages, 0), share)
    return padded_tokens(named, weights, turn, valid, arguments.config)


def _packed_weights(
    advantages: Tensor,  # (N,) or (A,)
    turn_offsets: Tensor,  # (N+1,)
    valid: Tensor | None,  # (A,)
    like: Tensor,  # (A,)
    aggregation: Aggregation,
) -> TokenWeights:
    advantages = advantages.detach().to(like.dtype)
    if advantages.shape != like.shape:
        sizes = turn_offsets.diff().long()
        advantages = advantages.repeat_interleave(sizes, output_size=like.numel())
    if valid is not None:
        advantages = torch.where(valid, advantages, 0)
    return token_weights_from_advantages(
        advantages, packed_shares(valid, turn_offsets, like, aggregation.reduction, aggregation.denominator)
    )
