"""Launches of the loss kernels as records, so that what is compiled ahead of time is what a call launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atpo_kernels.compilation import DTYPE_NAMES, Variant
from atpo_kernels.records import LossConfig
from atpo_kernels.turn_policy_loss.layout import LossArguments

_TYPES = DTYPE_NAMES | {torch.float64: "fp64", torch.int64: "i64", torch.int32: "i32", torch.bool: "i1"}


@dataclass(slots=True, kw_only=True)
class Launch:
    """A kernel, its arguments by name (tensor, number or None) and its constants."""

    kernel: Any  # triton.JITFunction
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int

    def run(self) -> None:
        """Launch it, if there is anything to do."""
        if self.programs:
            self.kernel[(self.programs,)](**self.arguments, **self.constants, num_warps=self.num_warps)

    def variant(self, label: str) -> Variant:
        """The same for compilation ahead of time."""
        absent = {name: None for name, value in self.arguments.items() if value is None}
        return Variant(
            kernel=self.kernel,
            label=label,
            types={name: _triton_type(value) for name, value in self.arguments.items() if value is not None},
            constants=absent | self.constants,
            num_warps=self.num_warps,
            divisible=tuple(name for name, value in self.arguments.items() if isinstance(value, Tensor)),
        )


def _triton_type(value: Tensor | int | float) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    return "i32" if isinstance(value, int) else "fp32"


def plain(tensor: Tensor | None) -> Tensor | None:
    """As a kernel reads it: detached, and copied if it is not contiguous."""
    return None if tensor is None else tensor.detach().contiguous()


def empty(like: Tensor, *shape: int) -> Tensor:
    """float32 on the device of another tensor."""
    return like.new_empty(shape, dtype=torch.float32)


def inverse(denominator: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """1/denominator as a number, or 1 and a tensor from which kernels read the denominator."""
    if isinstance(denominator, Tensor) and denominator.device == device:
        return 1.0, denominator.detach()
    return 1 / float(denominator), None


def token_pointers(arguments: LossArguments) -> dict[str, Tensor | None]:
    """What kernels read by token beside logprob and entropy; None for what the loss does not read."""
    inputs, weights, config = arguments.inputs, arguments.weights, arguments.config
    found = {
        "old_logprob": inputs.old_logprob,
        "ref_logprob": inputs.ref_logprob if config.needs_reference else None,
        "rollout_logprob": inputs.rollout_logprob if config.importance_cap is not None else None,
        "mask": arguments.structure.mask,
        "advantages": arguments.advantages,
        "weight_pos": None if weights is None else weights.pos,
        "weight_neg": None if weights is None else weights.neg,
        "weight_all": None if weights is None else weights.all,
    }
    return {name: plain(tensor) for name, tensor in found.items()}


def loss_scalars(config: LossConfig) -> dict[str, float]:
    """The numbers of the configuration, under the names that the kernels give them."""
    numbers = {
        "low": 1 - config.clip_low,
        "high": 1 + config.clip_high,
        "dual_cap": config.dual_cap,
        "tau_pos": config.sapo_tau_pos,
        "tau_neg": config.sapo_tau_neg,
        "max_log_ratio": config.max_log_ratio,
        "importance_cap": config.importance_cap or 0,
        "kl_coef": config.kl_coef,
        "entropy_coef": config.entropy_coef,
    }
    return {name: float(number) for name, number in numbers.items()}


def loss_constants(arguments: LossArguments) -> dict[str, Any]:
    """What the kernels are specialised on."""
    config, advantages = arguments.config, arguments.advantages
    return {
        "LEVEL": config.level,
        "CLIP": config.clip,
        "KL": config.kl,
        "REDUCTION": arguments.aggregation.reduction,
        "BY_TOKEN": advantages is not None and advantages.shape == arguments.inputs.logprob.shape,
    }
