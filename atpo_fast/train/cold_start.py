"""The model that RL starts from, and the cold start: imitation of demonstrations, loss on action tokens only.

A demonstration is a search tree with one leaf, so it takes the same packing, policy and head as RL; only the loss
differs: minus the mean log-prob of the action tokens.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import AutoTokenizer

from atpo_fast.adapters import has_adapters
from atpo_fast.common.errors import StopRequested
from atpo_fast.common.files import replacing
from atpo_fast.common.manifest import MANIFEST, damage, settle, write_manifest
from atpo_fast.config import ColdStartConfig, OptimConfig
from atpo_fast.objective import Objective
from atpo_fast.packing import PackedTrees, pack_trees, spread_rows
from atpo_fast.policy import Policy, score_rows
from atpo_fast.policy.opened_rows.plan import plan_passes
from atpo_fast.policy.opened_rows.prefix import RowPrefix
from atpo_fast.train.checkpoints import Checkpoints, load_checkpoint, newest_intact
from atpo_fast.train.from_config import build_model, max_prefix
from atpo_fast.train.identity import COLD_START, claim
from atpo_fast.train.loading import load_for_training
from atpo_fast.train.run import Run
from atpo_fast.train.step import accumulate, apply_gradients
from atpo_fast.train.weights import export_model, make_policy, trained_line, with_adapters
from atpo_fast.train.zero import device_of, initialize, set_learning_rate
from atpo_fast.tree import TurnTree

_LOG = logging.getLogger(__name__)
LIKELIHOOD = Objective(aggregation="token-mean")


def starting_model(run: Run) -> tuple[Path | str, float]:
    """Return (folder of the model that RL starts from, seconds that its cold start took).

    It is the model of a cold start where one precedes RL (`cold_start.when`), else the given or a random one.
    """
    given, demonstrations = run.config.model.path, bool(run.task.demonstrations)
    if run.config.cold_start.precedes_rl(demonstrations=demonstrations, given_model=given is not None):
        folder = cold_start(run)
        return folder, float(json.loads((folder / "state.json").read_text())["seconds"])
    if given is not None:
        if demonstrations:
            run.progress.message(
                f"no cold start: RL starts from the weights of model.path={given} (cold_start.when=always trains them "
                "on the demonstrations first)"
            )
        return given, 0.0
    return _random_model(run), 0.0


def cold_start(run: Run) -> Path:
    """Train on the task's demonstrations, from the given weights or random ones; returns the model's folder.

    A finished cold start of the same run folder is reused, an interrupted one continued from its newest checkpoint.

    Raises:
        ValueError: there are no demonstrations, or none are left beside those for validation.
        ChangedRunError: the folder holds a cold start of something else.
        StopRequested: the run was asked to stop; a checkpoint was saved.
    """
    folder = run.folder / "cold_start"
    finished = _finished(run, folder)
    resume_from = None if finished or run.config.train.resume == "never" else newest_intact(run, folder)
    record = run.folder / "cold_start.run.json"
    claim(run, record, COLD_START, continued=finished or resume_from is not None)
    if finished:
        run.progress.message(f"cold start: using {folder}")
        return folder
    if not run.task.demonstrations:
        raise ValueError(
            "cold start: the task has no demonstrations; set cold_start.demonstrations, cold_start.from_evidence or "
            "data.source=world"
        )
    policy = _policy(run, resume_from)
    if has_adapters(policy.model):
        run.progress.message(trained_line(policy))
    imitation = Imitation(run, policy, folder, resume_from)
    imitation.fit()
    export_model(policy, run.task.tokenizer, folder, is_main=run.is_main)
    if run.is_main:
        with replacing(folder / "state.json") as partial:
            partial.write_text(json.dumps({"seconds": imitation.seconds, "steps": imitation.step}))
        write_manifest(folder, {path.name: settle(path) for path in folder.iterdir() if path.is_file()})
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    run.barrier()
    imitation.zero.destroy()
    run.timer.pop()  # its phases are not the first RL step's
    return folder


def _policy(run: Run, checkpoint: Path | None) -> Policy:
    """Make the policy that a cold start begins with, or that of its checkpoint; with adapters where it has them."""
    config, seed = run.config.model, run.config.seed
    adapted = config.lora.rank > 0 and (
        config.path is not None if config.lora.cold_start is None else config.lora.cold_start
    )
    start = config if adapted or checkpoint is None else replace(config, path=str(checkpoint / "hf"))
    if start.path is None:
        model = build_model(start, run.task.tokenizer, seed)
    else:
        model = load_for_training(run.config, start.path)
    if adapted:
        model = with_adapters(model, config.lora, seed, checkpoint)
    return make_policy(model, config)


def _finished(run: Run, folder: Path) -> bool:
    """Tell whether a cold start is there, whole; warn of a damaged one, which begins again."""
    if not (folder / MANIFEST).is_file():
        return False
    reasons = run.gather([damage(folder) if run.is_main else None], run.world)
    if reasons[0] is None:
        return True
    if run.is_main:
        _LOG.warning("COLD START DAMAGED: %s: %s; it is made again", folder, reasons[0])
        (folder / MANIFEST).unlink()
    run.barrier()
    return False


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
    if run.is_main and damage(folder) is not None:
        with replacing(folder) as partial:
            build_model(run.config.model, run.task.tokenizer, run.config.seed).save_pretrained(partial)
            run.task.tokenizer.save_pretrained(partial)
            write_manifest(partial)
    run.barrier()
    return folder


class Imitation:
    """Supervised training of a policy on a run's demonstrations, with checkpoints in `folder`.

    Where `resume_from` is given, the policy has the weights of that checkpoint.

    Raises ValueError when no demonstration is left to train on.
    """

    def __init__(self, run: Run, policy: Policy, folder: Path, resume_from: Path | None = None):
        self._run, self._settings, self._policy = run, run.config.cold_start, policy
        self._checkpoints = Checkpoints(run, folder)
        optim = OptimConfig(lr=self._settings.lr, weight_decay=run.config.optim.weight_decay, betas=(0.9, 0.95))
        self.zero, self._watch = initialize(policy, run.config, optim)
        demonstrations, share = run.task.demonstrations, self._settings.validation_share
        for tree in demonstrations:
            tree.advantages = np.ones(len(tree))
        self._train, self._validation = _split(demonstrations, share, run.config.seed)
        self._prefix_tokens = max_prefix(run.config, LIKELIHOOD)
        self.step = 0
        self._losses: list[float] = []  # of the steps since the last record
        self._begun = time.monotonic()
        self._resume(resume_from)

    @property
    def seconds(self) -> float:
        """Wall time so far, that of earlier sessions included."""
        return time.monotonic() - self._begun

    def fit(self) -> None:
        """Take all steps. Raise StopRequested, with a checkpoint saved, when the run was asked to stop."""
        run, settings = self._run, self._settings
        run.progress.start_phase("cold start", settings.steps)
        losses = self._losses
        while self.step < settings.steps:
            self._stop_or_go_on()
            set_learning_rate(self.zero, settings.lr * _schedule(self.step, settings))
            loss, tokens, seconds = self._take_step(_draw(self._train, settings.batch_size, run.config.seed, self.step))
            self.step += 1
            losses.append(loss)
            last = self.step == settings.steps
            run.progress.advance(self.step, loss=loss)
            metrics: dict[str, float] = {}
            if (self.step - 1) % 10 == 0 or last:
                metrics |= {"cold_start/loss": float(np.mean(losses)), "cold_start/tokens_per_s": tokens / seconds}
                losses.clear()
            if self._validation and (self.step % settings.validate_every == 0 or last):
                metrics["cold_start/validation_loss"] = self.validation_loss()
                run.progress.message(
                    f"cold start: step {self.step}, validation loss {metrics['cold_start/validation_loss']:.4f}"
                )
            if metrics:
                run.logger.log("cold_start", self.step, metrics)
            if settings.save_every and self.step % settings.save_every == 0 and not last:
                self._save()
            self._checkpoints.settle(wait=False)
        self._checkpoints.settle(wait=True)

    def validation_loss(self) -> float:
        """Compute the mean loss a token of the demonstrations that are not trained on."""
        spread = self._rows(self._validation)[self._run.rank]
        scores = score_rows(self.zero, spread, device_of(self.zero))
        loss = -sum(float((row.weight_pos * logprob).sum()) for row, (logprob, _) in zip(spread, scores, strict=True))
        return self._run.sum_over_ranks({"loss": loss})["loss"]

    def _resume(self, checkpoint: Path | None) -> None:
        run = self._run
        if checkpoint is not None:
            state = load_checkpoint(run, self.zero, checkpoint)
            self.step, self._begun = int(state["step"]), self._begun - float(state["seconds"])
            self._losses = list(state["losses"])
            run.progress.message(f"cold start: resumed from {checkpoint}")
        run.logger.truncate_after(self.step or -1, ("cold_start",))

    def _save(self) -> None:
        state = {"step": self.step, "seconds": self.seconds, "losses": self._losses}
        self._checkpoints.save(self.zero, self._policy, state)

    def _stop_or_go_on(self) -> None:
        try:
            self._run.stop_together()
        except StopRequested:
            self._save()
            self._checkpoints.settle(wait=True)
            self._run.progress.message(f"stopped in the cold start after step {self.step}; the same command continues")
            raise

    def _rows(self, trees: list[TurnTree]) -> list[list[PackedTrees]]:
        """Pack trees into the rows of each rank."""
        rows = pack_trees(trees, LIKELIHOOD, self._run.config.train.row_tokens, max_prefix=self._prefix_tokens)
        return spread_rows(rows, self._run.world)

    def _take_step(self, batch: list[TurnTree]) -> tuple[float, int, float]:
        """Take one optimizer step; returns (loss, tokens, seconds)."""
        begun, run = time.monotonic(), self._run
        spread = self._rows(batch)
        losses: list[Tensor] = []

        def row_loss(row: PackedTrees, prefix: RowPrefix) -> Tensor:
            loss = -(row.weight_pos * self.zero(row, None, prefix)[0]).sum()
            losses.append(loss.detach())
            return loss

        accumulate(self.zero, spread[run.rank], plan_passes(spread)[run.rank], row_loss, run.timer)
        apply_gradients(self.zero, self._watch, run.timer)
        loss_sum = run.sum_over_ranks({"loss": float(sum(losses))})["loss"]
        return loss_sum, sum(row.num_tokens for rows in spread for row in rows), time.monotonic() - begun


def _split(trees: list[TurnTree], share: float, seed: int) -> tuple[list[TurnTree], list[TurnTree]]:
    """Split demonstrations into those to train on, in their order, and a random share for validation.

    Raises ValueError when nothing is left to train on.
    """
    count = math.ceil(share * len(trees))
    if count >= len(trees):
        raise ValueError(
            f"cold_start.validation_share={share:g} leaves none of {len(trees)} demonstrations to train on; lower it"
        )
    held_out = set(np.random.default_rng([seed, len(trees)]).permutation(len(trees))[:count].tolist())
    train = [tree for i, tree in enumerate(trees) if i not in held_out]
    return train, [trees[i] for i in sorted(held_out)]


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
