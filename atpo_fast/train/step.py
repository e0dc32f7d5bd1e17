"""One optimizer step over packed rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from atpo_fast.common.errors import MismatchError
from atpo_fast.common.ranks import reduce_over_ranks
from atpo_fast.objective import Objective
from atpo_fast.packing import PackedTrees
from atpo_fast.policy.opened_rows.plan import Pass, plan_passes
from atpo_fast.policy.opened_rows.prefix import RowPrefix, walk
from atpo_fast.telemetry import PhaseTimer
from atpo_fast.train.zero import GradientWatch, device_of, gradient_norm

MAX_METRICS = ("ratio_max",)


class MetricMean:
    """Means of row metrics weighted by action tokens; sums stay on the device until `result`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        self._tokens: Tensor | None = None
        self._grad_norms: list[float] = []
        self._steps = 0

    def add(self, metrics: dict[str, Tensor], loss: Tensor) -> None:
        """Take one row's metrics and its share of the loss."""
        tokens = metrics["tokens"].to(torch.float64)
        self._tokens = tokens if self._tokens is None else self._tokens + tokens
        for name, value in metrics.items():
            if name in MAX_METRICS:
                self._maxima[name] = torch.maximum(self._maxima.get(name, value), value)
            elif name not in ("tokens", "turns"):
                weighted = torch.where(tokens > 0, value.to(torch.float64) * tokens, 0.0)
                self._sums[name] = self._sums.get(name, torch.zeros_like(weighted)) + weighted
        self._sums["loss"] = self._sums.get("loss", torch.zeros_like(tokens)) + loss.detach().to(torch.float64)

    def step_taken(self, grad_norm: float | None) -> None:
        """Take the gradient norm of an optimizer step, where it is known."""
        self._steps += 1
        if grad_norm is not None:
            self._grad_norms.append(grad_norm)

    def result(self) -> dict[str, float]:
        """Means over all rows of all ranks; a collective."""
        out = {"grad_norm": sum(self._grad_norms) / len(self._grad_norms)} if self._grad_norms else {}
        if self._tokens is None:
            return out
        names, peaks = sorted(self._sums), sorted(self._maxima)
        sums = torch.stack([self._sums[n] for n in names] + [self._tokens]).cpu()
        maxima = torch.tensor([float(self._maxima[n]) for n in peaks], dtype=torch.float64)
        reduce_over_ranks(sums)
        reduce_over_ranks(maxima, dist.ReduceOp.MAX)
        tokens = max(float(sums[-1]), 1.0)
        for name, value in zip(names, sums[:-1].tolist(), strict=True):
            out[name] = value / max(self._steps, 1) if name == "loss" else value / tokens
        return out | dict(zip(peaks, maxima.tolist(), strict=True))


class Mismatch:
    """KL between the engine's and the trainer's log-probs of the same tokens, under the same weights.

    Taken from the forward of a batch's first update, so it costs nothing; it catches weights that were not synced,
    another temperature, or another tokenizer at once.
    """

    def __init__(self, limit: float):
        self._limit = limit
        self._sums: list[Tensor] = []
        self.kl: float | None = None  # mean k3, nats a token
        self.gap = 0.0  # mean absolute difference of the log-probs, nats a token

    def add(self, row: PackedTrees, logprob: Tensor) -> None:
        """Take one row's log-probs, (A,)."""
        difference = (logprob - row.rollout_logprob).double()
        fresh = row.trajectory_count > 0  # repeated and padding tokens have no log-prob of the engine's
        k3 = torch.where(fresh, torch.expm1(difference) - difference, 0.0)
        gap = torch.where(fresh, difference.abs(), 0.0)
        self._sums.append(torch.stack([k3.sum(), gap.sum(), fresh.sum().double()]))

    def settle(self) -> None:
        """Average over the ranks; a collective. Raises MismatchError above the limit."""
        total = reduce_over_ranks(torch.stack(self._sums).sum(0).cpu())
        self.kl, self.gap = (total[:2] / total[2].clamp(min=1)).tolist()
        if not self.kl <= self._limit:
            raise MismatchError(
                f"the log-probs of engine and trainer differ by {self.kl:.3g} nats a token (k3), more than "
                f"train.max_mismatch_kl={self._limit}: are weights synced, and do temperature and dtype agree?"
            )


def accumulate(
    engine: deepspeed.DeepSpeedEngine,
    rows: Sequence[PackedTrees],
    passes: Sequence[Pass],
    row_loss: Callable[[PackedTrees, RowPrefix], Tensor],
    timer: PhaseTimer,
) -> None:
    """Add up the gradients of this rank's rows, in its passes of `plan_passes`.

    `row_loss` gets a row on the engine's device, and its prefix. Row losses of all ranks sum to the mini-batch loss;
    DeepSpeed averages gradients over ranks, hence the factor.
    """
    device, world = device_of(engine), dist.get_world_size()
    for i, (kind, row, prefix) in enumerate(walk(rows, passes)):
        engine.set_gradient_accumulation_boundary(i == len(passes) - 1)
        if kind == "open":
            with timer.phase("forward"), torch.no_grad():
                engine(row.to(device), prefix=prefix, score=False)
            continue
        with timer.phase("forward"):
            loss = row_loss(row.to(device), prefix)
        with timer.phase("backward"):
            engine.backward(loss * world)


def apply_gradients(engine: deepspeed.DeepSpeedEngine, watch: GradientWatch, timer: PhaseTimer) -> None:
    """Step with what `accumulate` added up, unless some of it is not finite."""
    with timer.phase("step"):
        watch.settle()
        engine.step()


def optimizer_step(
    engine: deepspeed.DeepSpeedEngine,
    watch: GradientWatch,
    rows: Sequence[PackedTrees],
    passes: Sequence[Pass],
    objective: Objective,
    metrics: MetricMean,
    timer: PhaseTimer,
    mismatch: Mismatch | None = None,
) -> None:
    """One step on the objective over this rank's rows, in its passes of `plan_passes`.

    `mismatch` is filled and checked before the step; give it while the weights are those of the rollout.
    """

    def row_loss(row: PackedTrees, prefix: RowPrefix) -> Tensor:
        out = engine(row, objective, prefix)
        metrics.add(out.metrics, out.loss)
        if mismatch is not None:
            mismatch.add(row, out.logprob)
        return out.loss

    accumulate(engine, rows, passes, row_loss, timer)
    if mismatch is not None:
        mismatch.settle()
    apply_gradients(engine, watch, timer)
    metrics.step_taken(gradient_norm(engine))


@torch.no_grad()
def score_rows(engine: deepspeed.DeepSpeedEngine, rows: Sequence[PackedTrees]) -> list[tuple[Tensor, Tensor]]:
    """((A,) log-prob, (A,) entropy) of each row under the engine's present weights, on the rows' device."""
    device = device_of(engine)
    engine.eval()
    scores = []
    for kind, row, prefix in walk(rows, plan_passes([rows])[0]):
        if kind == "close":  # what it left is let go
            continue
        logprob, entropy = engine(row.to(device), None, prefix)
        home = row.input_ids.device
        scores.append((logprob.to(home), entropy.to(home)))
    engine.train()
    return scores


def with_logprob(
    rows: Sequence[PackedTrees], field: Literal["old_logprob", "ref_logprob"], scores: Sequence[tuple[Tensor, Tensor]]
) -> list[PackedTrees]:
    """Rows whose log-probs under the old or the reference policy are those of `score_rows`."""
    filled: list[PackedTrees] = []
    for row, (logprob, _) in zip(rows, scores, strict=True):
        changes: dict[str, Any] = {field: logprob.to(row.rollout_logprob.dtype)}
        filled.append(replace(row, **changes))
    return filled
