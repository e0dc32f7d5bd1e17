"""The model that RL starts from, and the cold start: imitation of demonstrations, loss on action tokens only.

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
from transformers import AutoTokenizer

from atpo_fast.common.files import replacing
from atpo_fast.config import ColdStartConfig, Config, OptimConfig
from atpo_fast.objective import Objective
from atpo_fast.packing import PackedTrees, pack_trees, spread_rows
from atpo_fast.policy import Policy
from atpo_fast.policy.opened_rows.plan import plan_passes
from atpo_fast.policy.opened_rows.prefix import RowPrefix
from atpo_fast.train.from_config import build_model, max_prefix
from atpo_fast.train.run import Run
from atpo_fast.train.step import accumulate, apply_gradients
from atpo_fast.train.weights import export_model
from atpo_fast.train.zero import GradientWatch, initialize, set_learning_rate
from atpo_fast.tree import TurnTree

LIKELIHOOD = Objective(aggregation="token-mean")


def starting_model(run: Run) -> tuple[Path | str, float]:
    """Return (folder of the model that RL starts from, seconds that its cold start took).

    It is the model of a cold start where the run has one (`wants_cold_start`), else the given or a random one.
    """
    given = run.config.model.path
    if wants_cold_start(run.config, bool(run.task.demonstrations)):
        folder = cold_start(run)
        return folder, float(json.loads((folder / "state.json").read_text())["seconds"])
    if given is not None:
        if run.task.demonstrations:
            run.progress.message(
                f"no cold start: RL starts from the weights of model.path={given} (cold_start.when=always trains them on "
                "the demonstrations first)"
            )
        return given, 0.0
    return _random_model(run), 0.0


def wants_cold_start(config: Config, demonstrations: bool) -> bool:
    """Tell whether RL begins with a cold start, given whether the task has demonstrations.

    Under `auto` the world's own demonstrations are for models made from scratch, those of the configuration for any.
    """
    settings = config.cold_start
    if settings.when == "never" or not demonstrations:
        return False
    asked_for = settings.from_evidence or settings.demonstrations is not None
    return settings.when == "always" or asked_for or config.model.path is None


def cold_start(run: Run) -> Path:
    """Train on the task's demonstrations; returns the folder with the Hugging Face model.

    A finished cold start of the same run folder is reused. Raises ValueError when there are no demonstrations.
    """
    folder = run.folder / "cold_start"
    if (folder / "state.json").is_file():
        run.progress.message(f"cold start: using {folder}")
        return folder
    if not run.task.demonstrations:
        raise ValueError(
            "cold start: the task has no demonstrations; set cold_start.demonstrations or data.source=world"
        )
    begun = time.monotonic()
    run.logger.truncate_after(-1, ("cold_start",))
    policy = Policy(
        build_model(run.config.model, run.task.tokenizer, run.config.seed),
        gradient_checkpointing=run.config.model.gradient_checkpointing,
        liger=run.config.model.liger,
    )
    zero = _fit(run, policy)
    export_model(policy, run.task.tokenizer, folder, is_main=run.is_main)
    if run.is_main:
        done = {"seconds": time.monotonic() - begun, "steps": run.config.cold_start.steps}
        with replacing(folder / "state.json") as partial:
            partial.write_text(json.dumps(done))
    run.barrier()
    zero.destroy()
    run.timer.pop()  # its phases are not the first RL step's
    return folder


def check_vocabulary(run: Run, folder: Path | str) -> None:
    """Raise ValueError when the model in `folder` was trained with another tokenizer than the task's."""
    if not (Path(folder) / "tokenizer.json").is_file():
        return
    other = AutoTokenizer.from_pretrained(folder).get_vocab()
    if other != run.task.tokenizer.get_vocab():
        raise ValueError(
            f"the model in {folder} was trained with another vocabulary ({len(other)} tokens) than this task's "
            f"({len(run.task.tokenizer)}); delete that folder or choose another run_dir"
        )


def _random_model(run: Run) -> Path:
    """Write a random model of the configured sizes to the run folder, unless it is there; returns its folder."""
    folder = run.folder / "initial_model"
    if run.is_main and not (folder / "tokenizer.json").is_file():  # written last
        build_model(run.config.model, run.task.tokenizer, run.config.seed).save_pretrained(folder)
        run.task.tokenizer.save_pretrained(folder)
    run.barrier()
    return folder


def _fit(run: Run, policy: Policy) -> deepspeed.DeepSpeedEngine:
    """Take all steps; returns DeepSpeed's engine, which has the weights."""
    config, settings = run.config, run.config.cold_start
    optim = OptimConfig(lr=settings.lr, weight_decay=config.optim.weight_decay, betas=(0.9, 0.95))
    zero, watch = initialize(policy, config, optim)
    demonstrations = run.task.demonstrations
    for tree in demonstrations:
        tree.advantages = np.ones(len(tree))
    prefix_tokens = max_prefix(config, LIKELIHOOD)
    run.progress.start_phase("cold start", settings.steps)
    losses: list[float] = []
    for step in range(settings.steps):
        run.stop_together()
        set_learning_rate(zero, settings.lr * _schedule(step, settings))
        batch = _draw(demonstrations, settings.batch_size, config.seed, step)
        loss, tokens, seconds = _step(run, zero, watch, batch, prefix_tokens)
        losses.append(loss)
        if step % 10 == 0 or step == settings.steps - 1:
            metrics = {"cold_start/loss": float(np.mean(losses)), "cold_start/tokens_per_s": tokens / seconds}
            run.logger.log("cold_start", step + 1, metrics)
            losses.clear()
        run.progress.advance(step + 1, loss=loss)
    return zero


def _step(
    run: Run, zero: deepspeed.DeepSpeedEngine, watch: GradientWatch, batch: list[TurnTree], prefix_tokens: int
) -> tuple[float, int, float]:
    """Take one optimizer step; returns (loss, tokens, seconds)."""
    begun = time.monotonic()
    rows = pack_trees(batch, LIKELIHOOD, run.config.train.row_tokens, max_prefix=prefix_tokens)
    spread = spread_rows(rows, run.world)
    losses: list[Tensor] = []

    def row_loss(row: PackedTrees, prefix: RowPrefix) -> Tensor:
        loss = -(row.weight_pos * zero(row, None, prefix)[0]).sum()
        losses.append(loss.detach())
        return loss

    accumulate(zero, spread[run.rank], plan_passes(spread)[run.rank], row_loss, run.timer)
    apply_gradients(zero, watch, run.timer)
    loss_sum = run.sum_over_ranks({"loss": float(sum(losses))})["loss"]
    return loss_sum, sum(row.num_tokens for row in rows), time.monotonic() - begun


def _draw(demonstrations: list[TurnTree], count: int, seed: int, step: int) -> list[TurnTree]:
    """Draw the demonstrations of a step without replacement, the same on every rank."""
    rng, size = np.random.default_rng([seed, step]), min(count, len(demonstrations))
    return [demonstrations[i] for i in rng.choice(len(demonstrations), size=size, replace=False)]


def _schedule(step: int, config: ColdStartConfig) -> float:
    """Return the factor of the learning rate: linear warm-up, then a cosine down to a tenth."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
