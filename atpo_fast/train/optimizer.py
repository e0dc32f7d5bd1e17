"""AdamW that can be told to leave the weights alone, and the watch that tells it.

DeepSpeed discards a step with non-finite gradients only under fp16 loss scaling. Here every precision and stage does:
hooks on the parameters note a non-finite gradient on the device, the ranks agree once per step, and the optimizer
then changes neither weights nor moments while DeepSpeed's own bookkeeping goes on as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from atpo_fast.common.ranks import reduce_over_ranks
from atpo_fast.config.schema import OptimConfig


class Guard:
    """Mix-in for an optimizer: its next `step` does nothing when `skip_next` is set."""

    skip_next: bool = False

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update, or none; the flag is set by `GradientWatch.settle`."""
        return None if self.skip_next else super().step(closure)  # type: ignore[misc]


class GuardedAdamW(Guard, torch.optim.AdamW):
    """AdamW on the device of its parameters."""


def make_optimizer(module: nn.Module, settings: OptimConfig, *, offload: bool) -> Guard:
    """AdamW for all parameters; with `offload` DeepSpeed's, which runs on the CPU (compiled on first use)."""
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if not offload:
        return GuardedAdamW(module.parameters(), **options)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    kind = type("GuardedCPUAdam", (Guard, DeepSpeedCPUAdam), {})
    return kind(list(module.parameters()), **options, adamw_mode=True)


class GradientWatch:
    """Notes whether any gradient of any micro-batch was non-finite."""

    def __init__(self, module: nn.Module, optimizer: Guard):
        parameters = [p for p in module.parameters() if p.requires_grad]
        self._bad = torch.zeros((), dtype=torch.bool, device=parameters[0].device)
        self._optimizer = optimizer
        self.skipped_steps = 0
        for parameter in parameters:
            parameter.register_hook(self._look)

    def _look(self, gradient: Tensor) -> None:
        self._bad |= ~torch.isfinite(gradient).all()

    def settle(self) -> bool:
        """Before the optimizer step: agree over the ranks; True when the step will be skipped."""
        flag = reduce_over_ranks(self._bad.to(torch.int32), dist.ReduceOp.MAX)
        self._bad.zero_()
        self._optimizer.skip_next = bool(flag)
        self.skipped_steps += int(flag)
        return self._optimizer.skip_next
