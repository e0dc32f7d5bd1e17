"""Argument checks of the operators that start from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_linear(
    operator: str,
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (A,)
    bias: Tensor | None,  # (V,)
    temperature: float,
) -> None:
    """Raise ValueError, naming the operator, unless the arguments fit together. Never waits for a GPU."""
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
    if not temperature > 0:
        raise ValueError(f"{operator}: temperature must be positive, got {temperature}")
    _check_targets(operator, targets, weight.shape[0])


def _check_targets(operator: str, targets: Tensor, vocab: int) -> None:
    """On the CPU only: elsewhere reading the extremes would wait for the device."""
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    low, high = (int(x) for x in targets.aminmax())
    if low < 0 or high >= vocab:
        raise ValueError(f"{operator}: targets must lie in [0, {vocab}), found {low if low < 0 else high}")
