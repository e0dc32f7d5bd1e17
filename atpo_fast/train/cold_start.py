"""The cold start: imitation of demonstrations, loss on action tokens only.

A demonstration is a search tree with one leaf, so it takes the same packing, policy and head as RL; only the loss
differs: minus the mean log-prob of the action tokens.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import deepspeed
import numpy as np
from torch import Tensor

from atpo_fast.config.schema import OptimConfig, SFTConfig
from atpo_fast.objective import Objective
from atpo_fast.packing import PackedTrees, pack_trees, spread_rows
from atpo_fast.policy import Policy, build_model
from atpo_fast.policy.opened_rows.plan import plan_passes
from atpo_fast.policy.opened_rows.prefix import RowPrefix
from atpo_fast.train.deepspeed_setup import initialize, set_learning_rate
from atpo_fast.train.optimizer import GradientWatch
from atpo_fast.train.row_budget import max_prefix
from atpo_fast.train.run import Run
from atpo_fast.train.step import accumulate, apply_gradients
from atpo_fast.train.weights import export_model
from atpo_fast.tree import TurnTree

LIKELIHOOD = Objective(aggregation="token-mean")


def cold_start(run: Run) -> Path:
    """Train on the task's demonstrations; returns the folder with the Hugging Face model.

    A finished cold start of the same run folder is reused. Raises ValueError when there are no demonstrations.
    """
    folder = run.folder / "cold_start"
    if (folder / "state.json").is_file():
        run.progress.message(f"cold start: using {folder}")
        return folder
    demonstrations = run.task.demonstrations
    if not demonstrations:
        raise ValueError("sft: the task has no demonstrations; set sft.demonstrations or data.source=world")
    begun = time.monotonic()
    run.logger.truncate_after(-1, ("sft",))
    config = run.config
    policy = Policy(
        build_model(config.model, run.task.tokenizer, config.seed),
        gradient_checkpointing=config.model.gradient_checkpointing,
        liger=config.model.liger,
    )
    optim = OptimConfig(lr=config.sft.lr, weight_decay=config.optim.weight_decay, betas=(0.9, 0.95))
    engine, watch = initialize(policy, config, optim)
    for tree in demonstrations:
        tree.advantages = np.ones(len(tree))
    prefix_tokens = max_prefix(config, LIKELIHOOD)
    run.progress.start_phase("sft", config.sft.steps)
    losses: list[float] = []
    for step in range(config.sft.steps):
        run.stop_together()
        set_learning_rate(engine, config.sft.lr * _schedule(step, config.sft))
        batch = _draw(demonstrations, config.sft.batch_size, config.seed, step)
        loss, tokens, seconds = _sft_step(run, engine, watch, batch, prefix_tokens)
        losses.append(loss)
        if step % 10 == 0 or step == config.sft.steps - 1:
            run.logger.log("sft", step + 1, {"sft/loss": float(np.mean(losses)), "sft/tokens_per_s": tokens / seconds})
            losses.clear()
        run.progress.advance(step + 1, loss=loss)
    export_model(policy, run.task.tokenizer, folder, is_main=run.is_main)
    if run.is_main:
        (folder / "state.json").write_text(json.dumps({"seconds": time.monotonic() - begun, "steps": config.sft.steps}))
    run.barrier()
    engine.destroy()
    run.timer.pop()  # its phases are not the first RL step's
    return folder


def _sft_step(
    run: Run, engine: deepspeed.DeepSpeedEngine, watch: GradientWatch, batch: list[TurnTree], prefix_tokens: int
) -> tuple[float, int, float]:
    """(loss, tokens, seconds) of one optimizer step."""
    begun = time.monotonic()
    rows = pack_trees(batch, LIKELIHOOD, run.config.train.max_tokens, max_prefix=prefix_tokens)
    spread = spread_rows(rows, run.world)
    losses: list[Tensor] = []

    def row_loss(row: PackedTrees, prefix: RowPrefix) -> Tensor:
        loss = -(row.weight_pos * engine(row, None, prefix)[0]).sum()
        losses.append(loss.detach())
        return loss

    accumulate(engine, spread[run.rank], plan_passes(spread)[run.rank], row_loss, run.timer)
    apply_gradients(engine, watch, run.timer)
    loss_sum = run.sum_over_ranks({"loss": float(sum(losses))})["loss"]
    return loss_sum, sum(row.num_tokens for row in rows), time.monotonic() - begun


def _draw(demonstrations: list[TurnTree], count: int, seed: int, step: int) -> list[TurnTree]:
    rng = np.random.default_rng([seed, step])
    return [
        demonstrations[i] for i in rng.choice(len(demonstrations), size=min(count, len(demonstrations)), replace=False)
    ]


def _schedule(step: int, config: SFTConfig) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
