"""Argument checks of the operators. None waits for a device: contents of tensors are checked on the CPU only."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from atpo_kernels.arguments import LossArguments, LossInputs
from atpo_kernels.records import HeadOptions, LossConfig
from atpo_kernels.tokens import turns_from_ids

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_linear(
    operator: str,
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (A,)
    bias: Tensor | None,  # (V,)
    options: HeadOptions,
) -> None:
    """Raise ValueError, naming the operator, unless hidden states, LM head and targets fit together."""
    if weight.numel() == 0:
        raise ValueError(
            f"{operator}: weight has no elements (shape {tuple(weight.shape)}). Under ZeRO-3 a parameter is whole only "
            "inside the forward of the module that owns it: call the operator there (gathering it around the call "
            "is enough only without gradients)"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{operator}: hidden must be (A, D) and weight (V, D), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"{operator}: targets must be ({hidden.shape[0]},), got {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{operator}: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    floats = [hidden, weight] if bias is None else [hidden, weight, bias]
    if hidden.dtype not in FLOATS or any(x.dtype != hidden.dtype for x in floats):
        names = ", ".join(str(x.dtype) for x in floats)
        raise ValueError(f"{operator}: hidden, weight and bias must have one floating dtype, got {names}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{operator}: targets must be int64 or int32, got {targets.dtype}")
    if any(x.device != hidden.device for x in [*floats, targets]):
        names = ", ".join(str(x.device) for x in [*floats, targets])
        raise ValueError(f"{operator}: all tensors must be on one device, got {names}")
    for name, value in options._asdict().items():
        if value is not None and not value > 0:
            raise ValueError(f"{operator}: {name} must be positive, got {value}")
    _check_targets(operator, targets, weight.shape[0])


def _check_targets(operator: str, targets: Tensor, vocab: int) -> None:
    """Raise ValueError for targets beyond the vocabulary; on the CPU only, as reading them would wait for a GPU."""
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    low, high = (int(x) for x in targets.aminmax())
    if low < 0 or high >= vocab:
        raise ValueError(f"{operator}: targets must lie in [0, {vocab}), found {low if low < 0 else high}")


def check_arguments(arguments: LossArguments) -> None:
    """Raise ValueError unless the arguments of a policy loss fit together."""
    logprob, advantages, weights = arguments.inputs.logprob, arguments.advantages, arguments.weights
    structure, averaging, config = arguments.structure, arguments.averaging, arguments.config
    if not logprob.is_floating_point() or logprob.dim() not in (1, 2):
        raise _error(f"logprob must be a float (A,) or (B, T), got {logprob.dtype} {tuple(logprob.shape)}")
    if (weights is None) == (advantages is None):
        raise _error("give either advantages or weights (W+, W-, W0)")
    _check_tensors(arguments)
    if weights is not None and averaging.reduction not in ("sum", "none"):
        raise _error(f"weights are aggregated, so reduction must be 'sum' or 'none', got {averaging.reduction!r}")
    if isinstance(averaging.denominator, Tensor) and averaging.denominator.numel() != 1:
        raise _error(f"denominator must be one number, got {tuple(averaging.denominator.shape)}")
    _check_config(arguments.inputs, config)
    _check_turn_clip(arguments)
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
    """Require that per-token tensors have the shape of logprob, and that all tensors are on its device."""
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
    everything |= {"clip_low": arguments.turn_clip.low, "clip_high": arguments.turn_clip.high}
    for name, tensor in everything.items():
        if tensor is not None and tensor.device != logprob.device:
            raise _error(f"{name} must be on {logprob.device} like logprob, got {tensor.device}")


def _check_config(inputs: LossInputs, config: LossConfig) -> None:
    """Require the tensors that the configuration reads."""
    for needed, name, why in (
        (config.needs_reference, "ref_logprob", f"kl={config.kl!r}"),
        (config.importance_cap is not None, "rollout_logprob", "importance_cap"),
        (config.needs_entropy, "entropy", "entropy_coef"),
    ):
        if needed and getattr(inputs, name) is None:
            raise _error(f"{why} is set, so {name} must be given")


def _check_turn_clip(arguments: LossArguments) -> None:
    """Check where clip ranges may be tensors of turns, and what these hold."""
    turn_offsets, config = arguments.structure.turn_offsets, arguments.config
    for name, tensor in (("clip_low", arguments.turn_clip.low), ("clip_high", arguments.turn_clip.high)):
        if tensor is None:
            continue
        if config.level == "sequence":
            raise _error(
                f"{name} by turn goes with level 'token' or 'turn': a ratio of level 'sequence' is that of many turns, "
                "so it has no turn's clip range. Give a number, or another level"
            )
        if config.clip == "sapo":
            raise _error(f"{name} by turn has no meaning with clip='sapo', whose gate has no bounds. Leave it out")
        if turn_offsets is None:
            raise _error(f"{name} by turn goes with packed turns: give turn_offsets, or a number")
        if tensor.shape != (turn_offsets.numel() - 1,) or not tensor.is_floating_point():
            raise _error(
                f"{name} by turn must be a float ({turn_offsets.numel() - 1},), got {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
        if tensor.device.type == "cpu" and not bool((tensor >= 0).all()):
            raise _error(f"{name} by turn must be at least 0 and not NaN")


def _check_packed(arguments: LossArguments, turn_offsets: Tensor) -> None:
    """Check what packed turns allow and need."""
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
    reduction = arguments.averaging.reduction
    if reduction.startswith("seq-"):
        raise _error(
            f"reduction={reduction!r} needs to know which turns form a sequence, which turn_offsets do not tell. "
            "Pass the aggregated weights=, or use 'sum', 'token-mean', 'turn-mean' or 'none'"
        )
    if arguments.config.level == "sequence" and (structure.paths is None or arguments.weights is None):
        raise _error("level='sequence' on packed turns needs weights and paths (leaf -> turns)")


def _check_turn_ids(turn_ids: Tensor, valid: Tensor) -> None:  # (B, T), (B, T) bool
    """Require ids in [0, T), and that only masked tokens lie between valid ones of one id in a row."""
    turn = turns_from_ids(turn_ids, valid)[valid]
    if len(turn.unique_consecutive()) != len(turn.unique()):
        raise _error("turn_ids: a turn's tokens must not be interrupted by tokens of another turn of the row")


def _error(message: str) -> ValueError:
    return ValueError(f"turn_policy_loss: {message}")
