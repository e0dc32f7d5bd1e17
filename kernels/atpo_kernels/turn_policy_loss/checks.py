"""Argument checks of `turn_policy_loss`; nothing here waits for a device."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from atpo_kernels.records import LossConfig
from atpo_kernels.turn_policy_loss.layout import LossArguments, LossInputs
from atpo_kernels.turn_policy_loss.tokens import turns_from_ids


def check_arguments(arguments: LossArguments) -> None:
    """Raise ValueError unless the arguments fit together. What lies in tensors is looked at on the CPU only."""
    logprob, advantages, weights = arguments.inputs.logprob, arguments.advantages, arguments.weights
    structure, aggregation, config = arguments.structure, arguments.aggregation, arguments.config
    if not logprob.is_floating_point() or logprob.dim() not in (1, 2):
        raise _error(f"logprob must be a float (A,) or (B, T), got {logprob.dtype} {tuple(logprob.shape)}")
    if (weights is None) == (advantages is None):
        raise _error("give either advantages or weights (W+, W-, W0)")
    _check_tensors(arguments)
    if weights is not None and aggregation.reduction not in ("sum", "none"):
        raise _error(f"weights are aggregated, so reduction must be 'sum' or 'none', got {aggregation.reduction!r}")
    if isinstance(aggregation.denominator, Tensor) and aggregation.denominator.numel() != 1:
        raise _error(f"denominator must be one number, got {tuple(aggregation.denominator.shape)}")
    _check_config(arguments.inputs, config)
    if structure.turn_offsets is not None:
        _check_packed(arguments, structure.turn_offsets)
    elif advantages is not None:
        allowed = (logprob.shape, logprob.shape[:1] if logprob.dim() == 2 else (1,))
        if advantages.shape not in allowed:
            raise _error(f"advantages must be (B,) or (B, T) = {tuple(logprob.shape)}, got {tuple(advantages.shape)}")
    if structure.turn_ids is not None and logprob.device.type == "cpu":
        valid = torch.ones_like(logprob, dtype=torch.bool) if structure.mask is None else structure.mask.bool()
        _check_turn_ids(structure.turn_ids.reshape(arguments.padded_shape), valid.view(arguments.padded_shape))


def _check_tensors(arguments: LossArguments) -> None:
    """Per-token tensors have the shape of logprob, and all tensors are on its device."""
    inputs, structure, weights = arguments.inputs, arguments.structure, arguments.weights
    logprob = inputs.logprob
    same_shape = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    same_shape |= {"mask": structure.mask, "turn_ids": structure.turn_ids}
    if weights is not None:
        same_shape |= {f"weights.{f.name}": getattr(weights, f.name) for f in fields(weights)}
    for name, tensor in same_shape.items():
        if tensor is not None and tensor.shape != logprob.shape:
            raise _error(f"{name} must be {tuple(logprob.shape)} like logprob, got {tuple(tensor.shape)}")
    everything = same_shape | {"advantages": arguments.advantages, "turn_offsets": structure.turn_offsets}
    for name, tensor in everything.items():
        if tensor is not None and tensor.device != logprob.device:
            raise _error(f"{name} must be on {logprob.device} like logprob, got {tensor.device}")


def _check_config(inputs: LossInputs, config: LossConfig) -> None:
    """The tensors that the configuration reads."""
    for needed, name, why in (
        (config.needs_reference, "ref_logprob", f"kl={config.kl!r}"),
        (config.importance_cap is not None, "rollout_logprob", "importance_cap"),
        (config.needs_entropy, "entropy", "entropy_coef"),
    ):
        if needed and getattr(inputs, name) is None:
            raise _error(f"{why} is set, so {name} must be given")


def _check_packed(arguments: LossArguments, turn_offsets: Tensor) -> None:
    logprob, advantages, structure = arguments.inputs.logprob, arguments.advantages, arguments.structure
    if logprob.dim() != 1 or turn_offsets.dim() != 1 or turn_offsets.numel() == 0 or structure.turn_ids is not None:
        raise _error(
            "turn_offsets go with (A,) tensors and without turn_ids; they must be (N+1,), "
            f"got {tuple(turn_offsets.shape)} and logprob {tuple(logprob.shape)}"
        )
    if turn_offsets.device.type == "cpu" and int(turn_offsets[-1]) != logprob.numel():
        raise _error(f"turn_offsets end at {int(turn_offsets[-1])}, but there are {logprob.numel()} tokens")
    turns = turn_offsets.numel() - 1
    if advantages is not None and advantages.shape not in ((turns,), logprob.shape):
        raise _error(
            f"advantages of packed turns must be ({turns},) or ({logprob.numel()},), got {tuple(advantages.shape)}"
        )
    reduction = arguments.aggregation.reduction
    if reduction.startswith("seq-"):
        raise _error(
            f"reduction={reduction!r} needs to know which turns form a sequence, which turn_offsets do not tell. "
            "Pass the aggregated weights=, or use 'sum', 'token-mean', 'turn-mean' or 'none'"
        )
    if arguments.config.level == "sequence" and (structure.paths is None or arguments.weights is None):
        raise _error("level='sequence' on packed turns needs weights and paths (leaf -> turns)")


def _check_turn_ids(turn_ids: Tensor, valid: Tensor) -> None:  # (B, T), (B, T) bool
    """Ids lie in [0, T), and valid tokens of one id follow each other in their row; masked ones may lie between."""
    turn = turns_from_ids(turn_ids, valid)[valid]
    if len(turn.unique_consecutive()) != len(turn.unique()):
        raise _error("turn_ids: a turn's tokens must not be interrupted by tokens of another turn of the row")


def _error(message: str) -> ValueError:
    return ValueError(f"turn_policy_loss: {message}")
