"""From a policy to a DeepSpeed engine (design, section 8)."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger
from torch import nn
from transformers.utils.logging import disable_progress_bar

from atpo_fast.config.schema import Config, ModelConfig, OptimConfig
from atpo_fast.train.optimizer import GradientWatch, make_optimizer

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


def join_process_group(*, cuda: bool) -> None:
    """Join the ranks that the launcher started, quietly.

    The group has a gloo part, so that counts and trees travel as CPU tensors. DeepSpeed's shared-memory collectives
    for CPUs are left out: compiling them takes a minute on a new machine and gloo does the same job.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)  # it warns of GuardedAdamW, which is AdamW
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(dist_backend="cpu:gloo,cuda:nccl" if cuda else "gloo", verbose=False)


def deepspeed_config(path: str, model: ModelConfig, optim: OptimConfig) -> dict[str, Any]:
    """The JSON at `path` plus what the run's own configuration decides.

    Rows are micro-batches of one; how many make a step changes from step to step, so accumulation is steered by the
    loop and DeepSpeed is told 1.

    Raises FileNotFoundError for a missing file and ValueError for a key that the run decides.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"deepspeed={path}: no such file")
    config: dict[str, Any] = json.loads(file.read_text())
    clash = [key for key in OWNED_KEYS if key in config]
    if clash:
        raise ValueError(f"{path}: {', '.join(clash)} are set from the run's configuration; remove them from this file")
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
    """A DeepSpeed engine over `policy` with AdamW, and the watch over its gradients."""
    settings = deepspeed_config(config.deepspeed, config.model, optim)
    zero = settings.get("zero_optimization", {})
    optimizer = make_optimizer(policy, optim, offload=zero.get("offload_optimizer", {}).get("device", "none") != "none")
    watch = GradientWatch(policy, optimizer)
    engine, _, _, _ = deepspeed.initialize(model=policy, optimizer=optimizer, config=settings)
    return engine, watch


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    """Learning rate of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """Norm of the last step's gradient before clipping; None where DeepSpeed does not tell (stage 0 in float32)."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def device_of(engine: deepspeed.DeepSpeedEngine) -> torch.device:
    """Where the engine's rows have to be."""
    return torch.device(engine.device)
