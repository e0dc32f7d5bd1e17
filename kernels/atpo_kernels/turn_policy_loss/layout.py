"""Argument checks of the policy loss, and the way from its arguments to a line of tokens."""

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
    old_logprob: Tensor
    ref_logprob: Tensor | None
    rollout_logprob: Tensor | None
    entropy: Tensor | None

    def named(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """Detached and cast."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: None if x is None else x.detach().to(dtype) for name, x in values}


def loss_tokens(
    inputs: LossInputs,
    advantages: Tensor | None,
    weights: TokenWeights | None,
    structure: Structure,
    aggregation: Aggregation,
    config: LossConfig,
) -> LossTokens:
    """Check the arguments of `turn_policy_loss` and lay them out."""
    turn_offsets, mask, turn_ids, paths = structure
    _check(inputs, advantages, weights, structure, aggregation.reduction, config)
    dtype = torch.float64 if inputs.logprob.dtype == torch.float64 else torch.float32
    valid = None if mask is None else mask.detach().bool()
    named = inputs.named(dtype)
    if turn_offsets is not None:
        if weights is None:
            assert advantages is not None
            weights = _packed_weights(advantages, turn_offsets, valid, inputs.logprob.to(dtype), aggregation)
        return packed_tokens(named, weights, turn_offsets, paths, valid, config)
    shape = inputs.logprob.shape if inputs.logprob.dim() == 2 else (1, inputs.logprob.numel())
    valid = torch.ones(shape, dtype=torch.bool, device=inputs.logprob.device) if valid is None else valid.view(shape)
    turn = turns_from_mask(valid) if turn_ids is None else turns_from_ids(turn_ids.reshape(shape), valid)
    if weights is None:
        assert advantages is not None
        advantages = advantages.detach().to(dtype)
        advantages = advantages.reshape(shape) if advantages.shape == inputs.logprob.shape else advantages.view(-1, 1)
        share = padded_shares(valid, turn, *aggregation, dtype)
        weights = token_weights_from_advantages(torch.where(valid, advantages, 0), share)
    return padded_tokens(named, weights, turn, valid, config)


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


def _check(
    inputs: LossInputs,
    advantages: Tensor | None,
    weights: TokenWeights | None,
    structure: Structure,
    reduction: Reduction,
    config: LossConfig,
) -> None:
    """Raise ValueError unless the arguments fit together."""
    where, logprob = "turn_policy_loss", inputs.logprob
    if not logprob.is_floating_point() or logprob.dim() not in (1, 2):
        raise ValueError(f"{where}: logprob must be a float (A,) or (B, T), got {logprob.dtype} {tuple(logprob.shape)}")
    if (weights is None) == (advantages is None):
        raise ValueError(f"{where}: give either advantages or weights (W+, W-, W0)")
    _check_tensors(inputs, advantages, weights, structure)
    if weights is not None and reduction not in ("sum", "none"):
        raise ValueError(f"{where}: weights are aggregated, so reduction must be 'sum' or 'none', got {reduction!r}")
    _check_config(inputs, config)
    if structure.turn_offsets is not None:
        _check_packed(logprob, advantages, structure.turn_offsets, structure.turn_ids)
        if config.level == "sequence" and (structure.paths is None or weights is None):
            raise ValueError(f"{where}: level='sequence' on packed turns needs weights and paths (leaf -> turns)")
    elif advantages is not None:
        allowed = (logprob.shape, logprob.shape[:1] if logprob.dim() == 2 else (1,))
        if advantages.shape not in allowed:
            raise ValueError(
                f"{where}: advantages must be (B,) or (B, T) = {tuple(logprob.shape)}, got {tuple(advantages.shape)}"
            )


def _check_tensors(
    inputs: LossInputs, advantages: Tensor | None, weights: TokenWeights | None, structure: Structure
) -> None:
    """Per-token tensors have the shape of logprob, and all tensors are on its device."""
    logprob = inputs.logprob
    same_shape = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    same_shape |= {"mask": structure.mask, "turn_ids": structure.turn_ids}
    if weights is not None:
        same_shape |= {f"weights.{f.name}": getattr(weights, f.name) for f in fields(weights)}
    for name, tensor in same_shape.items():
        if tensor is not None and tensor.shape != logprob.shape:
            raise ValueError(
                f"turn_policy_loss: {name} must be {tuple(logprob.shape)} like logprob, got {tuple(tensor.shape)}"
            )
    for name, tensor in (same_shape | {"advantages": advantages, "turn_offsets": structure.turn_offsets}).items():
        if tensor is not None and tensor.device != logprob.device:
            raise ValueError(f"turn_policy_loss: {name} must be on {logprob.device} like logprob, got {tensor.device}")


def _check_config(inputs: LossInputs, config: LossConfig) -> None:
    """The tensors that the configuration reads."""
    for needed, name, why in (
        (config.needs_reference, "ref_logprob", f"kl={config.kl!r}"),
        (config.importance_cap is not None, "rollout_logprob", "importance_cap"),
        (config.needs_entropy, "entropy", "entropy_coef"),
    ):
        if needed and getattr(inputs, name) is None:
            raise ValueError(f"turn_policy_loss: {why} is set, so {name} must be given")


def _check_packed(logprob: Tensor, advantages: Tensor | None, turn_offsets: Tensor, turn_ids: Tensor | None) -> None:
    if logprob.dim() != 1 or turn_offsets.dim() != 1 or turn_offsets.numel() == 0 or turn_ids is not None:
        raise ValueError(
            "turn_policy_loss: turn_offsets go with (A,) tensors and without turn_ids; they must be (N+1,), "
            f"got {tuple(turn_offsets.shape)} and logprob {tuple(logprob.shape)}"
        )
    if turn_offsets.device.type == "cpu" and int(turn_offsets[-1]) != logprob.numel():
        raise ValueError(
            f"turn_policy_loss: turn_offsets end at {int(turn_offsets[-1])}, but there are {logprob.numel()} tokens"
        )
    turns = turn_offsets.numel() - 1
    if advantages is not None and advantages.shape not in ((turns,), logprob.shape):
        raise ValueError(
            f"turn_policy_loss: advantages of packed turns must be ({turns},) or ({logprob.numel()},), "
            f"got {tuple(advantages.shape)}"
        )
