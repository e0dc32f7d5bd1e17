"""Two steps of `TurnGRPOTrainer`, in every rank, on completions that do not depend on how a batch is split."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM

from atpo_kernels.hosts.trl import TurnGRPOConfig, TurnGRPOTrainer
from tests.helpers.forked_runs import Group, run_group
from tests.helpers.small_tokenizers import word_level

GROUP, BATCH, T = 2, 4, 9
LOSSES = ("grpo", "dapo")
SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}


def write_all_weights(folder: Path) -> int:
    """Train on two ranks, then on one: in one batch, and in two micro-batches. Ranks are forks that have TRL."""
    for ranks, size in ((2, BATCH // 2), (1, BATCH), (1, BATCH // 2)):
        run_group(write_weights, (folder, size, BATCH // (size * ranks)), Group.alone(ranks))
    return 0


def write_weights(folder: Path, size: int, accumulation: int) -> None:
    """Train with `size` rows in a micro-batch of a rank; rank 0 writes the weights before and after, by loss type."""
    for loss_type in LOSSES:
        trainer = make_trainer(folder, size, accumulation, loss_type)
        weights = {f"before {name}": p.detach().numpy().copy() for name, p in trainer.model.named_parameters()}
        trainer.train()
        weights |= {name.removeprefix("module."): p.detach().numpy() for name, p in trainer.model.named_parameters()}
        if trainer.accelerator.is_main_process:
            ranks = trainer.accelerator.num_processes
            np.savez(folder / f"{loss_type}_{size}_{accumulation}_{ranks}", **weights)


def make_trainer(folder: Path, size: int, accumulation: int, loss_type: str) -> Any:
    """A trainer at the level of turns with plain SGD, so that weights differ as gradients do."""
    options: dict[str, Any] = {"report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "beta": 0.0}
    options |= {
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 9,
    }
    options |= {"num_iterations": 2, "max_completion_length": T, "disable_tqdm": True}
    tokenizer = word_level()
    tokenizer.pad_token = "<eos>"
    torch.manual_seed(0)
    return TurnGRPOTrainer(
        model=Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=2, **SIZES)).float(),
        reward_funcs=lambda completions, **_: [float(len(text) % 5) for text in completions],
        args=TurnGRPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            num_generations=GROUP,
            loss_type=loss_type,
            **options,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["e1 the </sea", "the e1 e1", "rch> the", "e1"]}),
        processing_class=tokenizer,
        rollout_func=completions_of,
    )


def completions_of(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Draw completions of several lengths, with a tool result inside, from the prompt and the place in its group."""
    tokenizer = trainer.processing_class
    out: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
    for number, prompt in enumerate(prompts):
        draw = random.Random(f"{prompt} {number % GROUP}")
        length = draw.randint(4, T)
        out["prompt_ids"].append(tokenizer.encode(prompt, add_special_tokens=False))
        out["completion_ids"].append([draw.randint(1, 6) for _ in range(length)])
        out["logprobs"].append([0.0] * length)
        out["env_mask"].append([int(place != 2) for place in range(length)])
    return out
