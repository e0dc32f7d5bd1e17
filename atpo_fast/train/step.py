"""One optimizer step over packed rows, under DeepSpeed; `zero` is its engine around the policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import deepspeed
import torch.distributed as dist
from torch import Tensor

from atpo_fast.objective import Objective
from atpo_fast.policy import Policy
from atpo_fast.policy.opened_rows.plan import Pass
from atpo_fast.policy.opened_rows.prefix import RowPrefix
from atpo_fast.policy.opened_rows.run import run_passes
from atpo_fast.telemetry import PhaseTimer
from atpo_fast.train.update_metrics import MetricMean, Mismatch
from atpo_fast.train.zero import GradientWatch, device_of, gradient_norm
from atpo_fast.tree.packed_rows import PackedTrees


def accumulate(
    zero: deepspeed.DeepSpeedEngine,
    rows: Sequence[PackedTrees],
    passes: Sequence[Pass],
    row_loss: Callable[[PackedTrees, RowPrefix], Tensor],
    timer: PhaseTimer,
) -> None:
    """Add up the gradients of this rank's rows, in its passes of `plan_passes`.

    `row_loss` gets a row on the policy's device, and its prefix. Row losses of all ranks sum to the mini-batch loss;
    DeepSpeed averages gradients over ranks, hence the factor.
    """
    world = dist.get_world_size()
    policy: Policy = zero.module
    if policy.router_loss is not None:
        policy.router_loss.begin(rows)

    def learn(row: PackedTrees, prefix: RowPrefix, last: bool) -> None:
        zero.set_gradient_accumulation_boundary(last)
        with timer.phase("forward"):
            loss = row_loss(row, prefix)
        with timer.phase("backward"):
            zero.backward(loss * world)

    zero.set_gradient_accumulation_boundary(False)  # also while rows are opened
    run_passes(zero, rows, passes, device_of(zero), learn, opening=lambda: timer.phase("forward"))


def apply_gradients(zero: deepspeed.DeepSpeedEngine, watch: GradientWatch, timer: PhaseTimer) -> None:
    """Step with what `accumulate` added up, unless some of it is not finite."""
    with timer.phase("step"):
        watch.settle()
        zero.step()


def optimizer_step(
    zero: deepspeed.DeepSpeedEngine,
    watch: GradientWatch,
    rows: Sequence[PackedTrees],
    passes: Sequence[Pass],
    objective: Objective,
    metrics: MetricMean,
    timer: PhaseTimer,
    mismatch: Mismatch | None = None,
) -> None:
    """Take one step on the objective over this rank's rows, in its passes of `plan_passes`.

    `mismatch` is filled and checked before the step; give it while the weights are those of the rollout.

    Raises MismatchError when the log-probs of engine and trainer differ by more than `mismatch` allows.
    """

    def row_loss(row: PackedTrees, prefix: RowPrefix) -> Tensor:
        out = zero(row, objective, prefix)
        metrics.add(out.metrics, out.loss)
        if mismatch is not None:
            mismatch.add(row, out.logprob)
        return out.loss

    accumulate(zero, rows, passes, row_loss, timer)
    if zero.module.router_loss is not None:
        metrics.add_router_loss(zero.module.router_loss.total)
    if mismatch is not None:
        mismatch.settle()
    apply_gradients(zero, watch, timer)
    metrics.step_taken(gradient_norm(zero))


def with_logprob(
    rows: Sequence[PackedTrees], field: Literal["old_logprob", "ref_logprob"], scores: Sequence[tuple[Tensor, Tensor]]
) -> list[PackedTrees]:
    """Fill the rows' log-probs under the old or the reference policy with those of `score_rows`."""
    filled: list[PackedTrees] = []
    for row, (logprob, _) in zip(rows, scores, strict=True):
        changes: dict[str, Any] = {field: logprob.to(row.rollout_logprob.dtype)}
        filled.append(replace(row, **changes))
    return filled
