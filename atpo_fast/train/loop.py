"""The RL loop: roll out, score, credit, pack, update, sync (docs/design.md#loop).

One step rolls out `questions_per_step` questions over all ranks (with dynamic sampling, as many as it takes for so many
that vary) and takes one optimizer step per mini-batch of `questions_per_minibatch`. Every rank then holds the whole
forest, so that credit, packing and the split of rows are the same everywhere and the denominators are global without
further communication.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import inf
from pathlib import Path

import deepspeed
import torch
from torch import Tensor

from atpo_fast.adapters import has_adapters, without_adapters
from atpo_fast.common.errors import AlarmError, DynamicSamplingError, StopRequested
from atpo_fast.common.ranks import reduce_over_ranks
from atpo_fast.config import LoRAConfig
from atpo_fast.credit import assign_credit
from atpo_fast.data.questions import Question
from atpo_fast.packing import PackedTrees, apply_entropy_advantage
from atpo_fast.policy import score_rows
from atpo_fast.telemetry.alarms import look, outcome_words
from atpo_fast.train.checkpoints import Checkpoints, load_checkpoint
from atpo_fast.train.dynamic_sampling import Filled, describe, fill, read_surplus, sampling_metrics, write_surplus
from atpo_fast.train.evaluate import NOTHING_EVALUATED, evaluate_step
from atpo_fast.train.from_config import make_objective, max_prefix
from atpo_fast.train.information_gain import measure_gold
from atpo_fast.train.minibatches import pack_minibatches, trees_per_minibatch
from atpo_fast.train.packing_check import check_packing
from atpo_fast.train.run import Run
from atpo_fast.train.sampler import Batch, BatchSampler, Sampler
from atpo_fast.train.schedule import Draw, draw_questions, sampling_seed
from atpo_fast.train.scoring import Group, score_batch
from atpo_fast.train.step import optimizer_step, with_logprob
from atpo_fast.train.step_metrics import add_up, no_signal, rollout_metrics
from atpo_fast.train.train_state import TrainState
from atpo_fast.train.update_metrics import MetricMean, Mismatch
from atpo_fast.train.weights import load_policy, trained_line
from atpo_fast.train.zero import device_of, initialize, set_learning_rate
from atpo_fast.tree import Forest, as_forest
from atpo_fast.tree.storage import tree_record

TOTALS = ("unique", "flat", "trained", "prefilled", "shared", "decoded", "cache_hit", "pruned", "skipped_backward")


class Trainer:
    """The RL loop of a run, with its policy, optimizer, sampler and progress.

    Args:
        run: the run.
        start: folder of the model that RL starts from; the reference, where there is one.
        resume_from: checkpoint to continue from.
        seconds: time spent so far.
    """

    def __init__(self, run: Run, start: Path | str, resume_from: Path | None, seconds: float):
        self.run, self.config = run, run.config
        self.objective = make_objective(run.config)
        self._begun = time.monotonic() - seconds
        self.policy = load_policy(run.config, start, resume_from)
        if has_adapters(self.policy.model):
            run.progress.message(trained_line(self.policy))
        self.max_prefix = max_prefix(run.config, self.objective)
        self.zero, self.watch = initialize(self.policy, run.config, run.config.optim)
        if run.config.train.check_packing:
            found = check_packing(self.policy, device_of(self.zero))
            run.progress.message(f"packed tree against trajectories: {'; '.join(map(str, found))}")
        self.reference = self._make_reference(start)
        self.sampler = Sampler(run, start, self.zero.device, run.config.model.lora.adapters)
        self.batches = BatchSampler(self.sampler, self._questions, lambda draw: sampling_seed(run.config.seed, draw))
        self.state = TrainState()
        self.surplus: list[Group] = []  # groups that dynamic sampling has kept for the next step
        self.checkpoints = Checkpoints(run, run.folder)
        self.alarms: dict[str, str] = {}  # alarms that began with the last step
        if resume_from is None:
            torch.manual_seed(run.config.seed)  # whether this process has made the cold start or not
            run.logger.truncate_after(-1)
        else:
            self._resume(resume_from)

    def _resume(self, checkpoint: Path) -> None:
        self.state = TrainState(**load_checkpoint(self.run, self.zero, checkpoint))
        self.watch.skipped_steps = self.state.skipped_steps
        self.surplus = read_surplus(self.run, checkpoint, self.state.kept)
        self._begun = time.monotonic() - self.state.seconds
        self.sampler.sync(self.policy)
        self.run.logger.truncate_after(self.state.step)
        self.run.progress.message(f"resumed from {checkpoint}")

    def _make_reference(self, start: Path | str) -> deepspeed.DeepSpeedEngine | None:
        """Make a frozen copy of the starting policy when the objective has a KL term.

        A policy with adapters is its own copy without them, unless another reference is given.
        """
        given = self.config.model.reference_path
        if not self.objective.loss_config.needs_reference or (given is None and has_adapters(self.policy.model)):
            return None
        whole = replace(self.config, model=replace(self.config.model, lora=LoRAConfig()))
        return initialize(load_policy(whole, given or start), self.config, self.config.optim)[0]

    def _reference_scores(self, rows: list[PackedTrees]) -> list[tuple[Tensor, Tensor]]:
        """Score rows as `score_rows` does, under the reference policy."""
        if self.reference is not None:
            return score_rows(self.reference, rows, device_of(self.reference))
        with without_adapters(self.policy):
            return score_rows(self.zero, rows, device_of(self.zero))

    def fit(self) -> bool:
        """Run to the last step; False when stopped early (a checkpoint was saved)."""
        try:
            self._run()
        except (DynamicSamplingError, AlarmError):  # raised on every rank too
            self.save()
            self.checkpoints.settle(wait=True)
            raise
        except StopRequested:  # raised on every rank, and only while the weights are those of the last finished step
            self.save()
            self.checkpoints.settle(wait=True)
            self.run.progress.message(f"stopped after step {self.state.step}; the same command continues from here")
            return False
        self.checkpoints.settle(wait=True)
        return True

    def _run(self) -> None:
        if not self.run.task.eval:
            self.run.progress.message(NOTHING_EVALUATED)
        if self.state.cold_start_em is None:
            self._evaluate()
            self.state.cold_start_em = self.state.eval_em
        while not self._finished():
            self._step()
            self.checkpoints.settle(wait=False)
            if self._due(self.config.train.eval_every):
                self._evaluate()
            action = self.config.logging.alarms.action if self.alarms else "tell"
            if self._due(self.config.train.save_every) or action == "save":
                self.save()
            if action == "stop":
                raise AlarmError(
                    f"stopped after step {self.state.step} by the alarms {', '.join(self.alarms)} "
                    "(logging.alarms.action=stop); a checkpoint is saved, and the same command continues"
                )
        if self.state.eval_step != self.state.step:  # stopped in the last evaluation, now resumed
            self._evaluate()

    def _due(self, every: int) -> bool:
        return self._finished() or (every > 0 and self.state.step % every == 0)

    def _finished(self) -> bool:
        budget = self.config.train.token_budget
        spent = budget is not None and self.state.totals.get("decoded", 0.0) >= budget
        return spent or self.state.step >= self.config.train.steps

    def save(self) -> None:
        """Write a checkpoint of the last finished step."""
        state, surplus = self.state, self.surplus
        state.seconds = time.monotonic() - self._begun
        state.skipped_steps = self.watch.skipped_steps
        state.kept = [[group.place, group.weights_step, len(group.trees)] for group in surplus]
        with self.run.timer.phase("checkpoint"):
            self.checkpoints.save(self.zero, self.policy, asdict(state), lambda folder: write_surplus(folder, surplus))

    def _evaluate(self) -> None:
        means = evaluate_step(self.run, self.sampler, self.state.step)
        self.state.eval_em, self.state.eval_step = means["eval/em"], self.state.step
        if means["eval/questions"]:
            self.run.progress.message(
                f"step {self.state.step}: eval EM {means['eval/em']:.3f}, F1 {means['eval/f1']:.3f}"
            )

    def _step(self) -> None:
        """Roll out, score, credit, pack, update, sync: one batch."""
        run, begun = self.run, time.monotonic()
        batches: list[Batch] = []
        filled = fill(
            self.config.train.questions_per_step,
            self.surplus,
            lambda refill: self._roll_out_and_score(refill, batches),
            self.config.train.dynamic_sampling,
        )
        self.surplus = filled.kept
        self.state.cursor += sum(batch.draw.count for batch in batches)
        staleness = max((self.state.step - group.weights_step for group in filled.groups), default=0)
        self._roll_out_ahead()
        if self.config.credit.needs_gold:
            with run.timer.phase("gain"):
                measure_gold(run, self.zero, [scored for group in filled.groups for scored in group.trees])
        with run.timer.phase("credit"):
            forest = as_forest([scored.tree for group in filled.groups for scored in group.trees])
            assign_credit(forest, **self.config.credit.arguments)
        skipped = self.policy.skipped_tokens
        metrics, pruned = self._update(forest, [len(group.trees) for group in filled.groups], staleness)
        skipped = self.policy.skipped_tokens - skipped
        with run.timer.phase("rollout_wait"):
            self.batches.join()
        self.sampler.sync(self.policy)
        self.state.step += 1
        self._log(filled, batches, metrics | {"rollout/staleness": float(staleness)}, pruned, skipped, begun)

    def _roll_out_and_score(self, refill: int, batches: list[Batch]) -> list[Group]:
        """Roll out and score the next questions, and gather those of all ranks; this rank's part goes to `batches`."""
        run = self.run
        draw = self._draw(self.state.step, refill, self.state.cursor + sum(batch.draw.count for batch in batches))
        run.progress.start_phase("rollout", self.config.rollout.leaves * len(self._questions(draw)))
        batches.append(self.batches.take(draw))
        run.stop_together()
        return run.gather(score_batch(run, batches[-1]), draw.count)

    def _roll_out_ahead(self) -> None:
        """Begin the next step's roll-out by the present weights, where that is wanted."""
        following = self.state.step + 1
        if self.config.train.max_staleness and following < self.config.train.steps:
            self.batches.begin(self._draw(following, 0, self.state.cursor), weights_step=self.state.step)

    def _draw(self, step: int, refill: int, first: int) -> Draw:
        train = self.config.train
        asked = train.dynamic_sampling.questions_per_rollout if train.dynamic_sampling.enabled else None
        return Draw(step, first, asked or train.questions_per_step, refill)

    def _questions(self, draw: Draw) -> list[Question]:
        """Return this rank's questions of a draw."""
        return self.run.share(draw_questions(self.run.task.train, self.config.seed, draw.first, draw.count))

    def _update(self, forest: Forest, trees: list[int], staleness: int) -> tuple[dict[str, float], int]:
        """Take the optimizer steps of one batch, given the number of trees of each question.

        Returns (metrics of the update, tokens that packing pruned).
        """
        run, train = self.run, self.config.train
        with run.timer.phase("pack"):
            batches = pack_minibatches(
                forest,
                self.objective,
                trees_per_minibatch(trees, train.questions_per_minibatch),
                row_tokens=train.row_tokens,
                max_prefix=self.max_prefix,
                rank=run.rank,
                world=run.world,
            )
        with run.timer.phase("logprob"):
            prepared = [self._prepare(b.rows, on_policy=i == staleness == 0) for i, b in enumerate(batches)]
        limit = inf if staleness else train.max_mismatch_kl  # older weights may differ
        metrics, mismatch, before = MetricMean(), Mismatch(limit), self.state.optimizer_steps
        run.progress.start_phase("update", len(batches))
        with run.timer.phase("update"):
            for i, (rows, batch) in enumerate(zip(prepared, batches, strict=True)):
                if rows:  # every question may have had equal rewards: no gradient anywhere, the same on every rank
                    set_learning_rate(self.zero, self._learning_rate())
                    fresh = mismatch if mismatch.kl is None else None
                    optimizer_step(self.zero, self.watch, rows, batch.passes, self.objective, metrics, run.timer, fresh)
                    self.state.optimizer_steps += 1
                run.progress.advance(i + 1)
        policy = {f"policy/{name}": value for name, value in metrics.result().items()}
        policy["policy/updates"] = float(self.state.optimizer_steps - before)
        if mismatch.kl is not None:
            policy |= {"rollout/mismatch_kl": mismatch.kl, "rollout/logprob_gap": mismatch.gap}
        return policy, sum(batch.pruned for batch in batches)

    def _prepare(self, rows: list[PackedTrees], on_policy: bool) -> list[PackedTrees]:
        """Fill old and reference log-probs, and apply the entropy-aware advantage where the objective has one.

        A mini-batch is on-policy when the policy that sampled it learns from it: its old log-probs are those of its
        own forward, so no pass is needed for them.
        """
        if not rows:
            return rows
        recompute = self.config.train.old_logprobs == "recompute"
        if self.objective.entropy_advantage or (recompute and not on_policy):
            scores = score_rows(self.zero, rows, device_of(self.zero))
            rows = with_logprob(rows, "old_logprob", scores) if recompute else rows
            entropies = [entropy for _, entropy in scores]
            rows = apply_entropy_advantage(rows, entropies, self.objective, all_reduce=reduce_over_ranks)
        elif recompute:
            rows = [replace(row, old_logprob=None) for row in rows]
        if self.objective.loss_config.needs_reference:
            rows = with_logprob(rows, "ref_logprob", self._reference_scores(rows))
        return rows

    def _learning_rate(self) -> float:
        optim = self.config.optim
        return optim.lr * min(1.0, (self.state.optimizer_steps + 1) / max(1, optim.warmup_steps))

    def _log(
        self,
        filled: Filled,
        batches: Sequence[Batch],
        metrics: dict[str, float],
        pruned: int,
        skipped: int,
        begun: float,
    ) -> None:
        """Log the metrics of a finished step, those of `_update` among them, and write some of its trees."""
        run, train = self.run, self.config.train
        trained = [scored.tree for group in filled.groups for scored in group.trees]
        none = dict.fromkeys(self.sampler.counts(), 0.0)
        counted = add_up([none, *(batch.counts for batch in batches)])
        counts = run.sum_over_ranks(counted | {"tokens/skipped_backward": float(skipped)})
        counts["tokens/pruned"] = float(pruned)  # every rank has packed the same forest
        counts["tokens/trained"] = float(sum(tree.unique_tokens for tree in trained) - pruned)
        metrics = (
            rollout_metrics(
                [scored for group in filled.rolled_out for scored in group.trees],
                counts,
                sum(batch.seconds for batch in batches),
                sum(batch.waited for batch in batches),
                time.monotonic() - begun,
            )
            | {f"time/{name}": seconds for name, seconds in add_up(batch.phases for batch in batches).items()}
            | metrics
            | {
                "policy/skipped_steps": float(self.watch.skipped_steps),
                "sampling/no_signal": no_signal(filled.rolled_out),
            }
            | {f"time/{name}": seconds for name, seconds in run.timer.pop().items()}
        )
        if train.dynamic_sampling.enabled:
            metrics |= sampling_metrics(filled)
            what = describe(filled, train.questions_per_step, train.dynamic_sampling.metric)
            run.progress.message(f"step {self.state.step}: {what}")
        for name in TOTALS:
            self.state.totals[name] = self.state.totals.get(name, 0.0) + metrics[f"tokens/{name}"]
        self.alarms, holding = look(metrics, self.config.logging.alarms, self.state.alarms)
        run.logger.log("train", self.state.step, metrics | holding)
        run.progress.step_done(self.state.step, train.steps, metrics)
        self._tell(metrics)
        if run.is_main and train.save_trees:
            shown = trained[: train.save_trees]
            run.logger.log_trees([tree_record(tree, self.state.step, run.task.tokenizer) for tree in shown])

    def _tell(self, metrics: dict[str, float]) -> None:
        """Say why a step had no update, and which alarms have begun."""
        if not metrics["policy/updates"]:
            self.run.progress.message(
                f"step {self.state.step}: no update, because no trajectory earned more or less than its question's "
                f"others; outcomes: {outcome_words(metrics)}"
            )
        for name, text in self.alarms.items():
            self.run.progress.message(f"ALARM {name}, step {self.state.step}: {text}")

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, earlier sessions included."""
        return time.monotonic() - self._begun
