"""DeepSpeed: from a policy to an engine of ZeRO, and an optimizer that leaves out steps with non-finite gradients.

DeepSpeed's engine is called `zero` throughout, so that `engine` is the inference engine.

DeepSpeed discards a step with non-finite gradients only under fp16 loss scaling. Here every precision and stage does:
hooks on the parameters note a non-finite gradient on the device, the ranks agree once per step, and the optimizer
then changes neither weights nor moments while DeepSpeed's own bookkeeping continues as usual.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from deepspeed.utils import logger, set_z3_leaf_module
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from atpo_fast.common.ranks import reduce_over_ranks
from atpo_fast.config import Config, ModelConfig, OptimConfig

OWNED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
)

# --- set-up ------------------------------------------------------------------------------------------------------


def join_process_group(*, cuda: bool) -> None:
    """Join the ranks that the launcher started, quietly.

    The group has a gloo part, so that counts and trees travel as CPU tensors. DeepSpeed's shared-memory collectives
    for CPUs are left out: compiling them takes a minute on a new machine and gloo does the same job.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)  # it warns of GuardedAdamW, which is AdamW
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    _import_muon()
    deepspeed.init_distributed(dist_backend="cpu:gloo,cuda:nccl" if cuda else "gloo", verbose=False)


def _import_muon() -> None:
    """Import Muon, an optimizer of DeepSpeed's that is not offered here, without marking it for `torch.compile`.

    Every stage of ZeRO imports it when it starts. The marks would load PyTorch's compiler, a second of CPU time a rank.
    """
    marking = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        with suppress(ImportError):  # a DeepSpeed that has it elsewhere; only time is lost
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = marking


def deepspeed_config(path: str, model: ModelConfig, optim: OptimConfig) -> dict[str, Any]:
    """Read the JSON at `path` and add what the run's own configuration decides.

    Rows are micro-batches of one. How many make a step changes from step to step, so accumulation is steered by the
    loop and DeepSpeed is told 1.

    Raises FileNotFoundError for a missing file and ValueError for a key that the run decides, or offload to nvme.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"deepspeed={path}: no such file")
    config: dict[str, Any] = json.loads(file.read_text())
    clash = [key for key in OWNED_KEYS if key in config]
    if clash:
        raise ValueError(f"{path}: {', '.join(clash)} are set from the run's configuration; remove them from this file")
    zero = config.get("zero_optimization", {})
    if "nvme" in [zero.get(f"offload_{part}", {}).get("device") for part in ("optimizer", "param")]:
        raise ValueError(f"{path}: offload to nvme cannot be written into checkpoints here; set the device to cpu")
    config.update(
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=1,
        gradient_clipping=optim.grad_clip,
        steps_per_print=10**9,
        bf16={"enabled": model.dtype == "bfloat16"},
    )
    return config


def initialize(
    policy: nn.Module, config: Config, optim: OptimConfig
) -> tuple[deepspeed.DeepSpeedEngine, GradientWatch]:
    """Make DeepSpeed's engine over `policy` with AdamW, and the watch over its gradients."""
    settings = deepspeed_config(config.deepspeed, config.model, optim)
    offload = settings.get("zero_optimization", {}).get("offload_optimizer", {})
    optimizer = make_optimizer(policy, optim, offload=offload.get("device", "none") != "none")
    watch = GradientWatch(policy, optimizer)
    gather_experts_whole(policy)
    zero, _, _, _ = deepspeed.initialize(model=policy, optimizer=optimizer, config=settings)
    return zero, watch


def gather_experts_whole(policy: nn.Module) -> None:
    """Let ZeRO-3 gather the experts of a layer as one module, with all that is inside.

    What is inside may be called once for each expert that has tokens. That is a number of calls of the rank's own, and
    DeepSpeed, which gathers and prefetches call by call, wants the same ones on all ranks.
    """
    for module in policy.modules():
        if type(module).__name__.endswith("Experts"):
            set_z3_leaf_module(module, True)


# --- use ---------------------------------------------------------------------------------------------------------


def set_learning_rate(zero: deepspeed.DeepSpeedEngine, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in zero.optimizer.param_groups:
        group["lr"] = lr


def gradient_norm(zero: deepspeed.DeepSpeedEngine) -> float | None:
    """Return the norm of the last step's gradient before clipping; None where DeepSpeed does not know it.

    It does not at stage 0 in float32.
    """
    norm = zero.get_global_grad_norm()
    return None if norm is None else float(norm)


def device_of(zero: deepspeed.DeepSpeedEngine) -> torch.device:
    """Return the device on which rows have to be."""
    return torch.device(zero.device)


# --- optimizer ---------------------------------------------------------------------------------------------------


class Guard:
    """Mix-in for an optimizer: its next `step` does nothing when `skip_next` is set."""

    skip_next: bool = False

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take one step, or none; the flag is set by `GradientWatch.settle`."""
        return None if self.skip_next else super().step(closure)  # type: ignore[misc]


class GuardedAdamW(Guard, torch.optim.AdamW):
    """AdamW on the device of its parameters."""


def make_optimizer(module: nn.Module, settings: OptimConfig, *, offload: bool) -> Guard:
    """Make AdamW for all parameters that are trained; with `offload` DeepSpeed's, which runs on the CPU (compiled on
    first use).
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if not offload:
        return GuardedAdamW(trained, **options)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    kind = type("GuardedCPUAdam", (Guard, DeepSpeedCPUAdam), {})
    return kind(trained, **options, adamw_mode=True)


class GradientWatch:
    """A watch that notes whether any gradient of any micro-batch was non-finite."""

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
        """Agree over the ranks, before the optimizer step, whether it will be skipped; True when it will."""
        flag = reduce_over_ranks(self._bad.to(torch.int32), dist.ReduceOp.MAX)
        self._bad.zero_()
        self._optimizer.skip_next = bool(flag)
        self.skipped_steps += int(flag)
        return self._optimizer.skip_next
