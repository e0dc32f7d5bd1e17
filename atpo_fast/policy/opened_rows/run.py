"""The loops over rows of which some are opened: one to learn from them, one to score them (docs/design.md#opened-rows).

Everything that forwards packed rows goes through here: the trainer's updates, the cold start, the scoring under the old
and the reference policy, and trainers without DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from atpo_fast.objective import Objective
from atpo_fast.policy.opened_rows.plan import Pass, plan_passes
from atpo_fast.policy.opened_rows.prefix import RowPrefix, walk
from atpo_fast.policy.policy import Policy
from atpo_fast.tree.packed_rows import PackedTrees


def run_passes(
    model: nn.Module,
    rows: Sequence[PackedTrees],
    passes: Sequence[Pass],
    device: torch.device,
    learn: Callable[[PackedTrees, RowPrefix, bool], None],
    opening: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Make a rank's passes over its rows: forward those to open, and let `learn` do forward and backward of the others.

    Args:
        model: a `Policy`, or DeepSpeed's engine around one.
        rows: the rank's rows.
        passes: the rank's list of `plan_passes`.
        device: where the model wants its rows.
        learn: is given a row on the device, its prefix, and whether this is the last pass. It must keep neither of
            them, or the memory of closed rows is not freed.
        opening: makes the context in which a row is opened, to time it for instance.
    """
    for number, (kind, row, prefix) in enumerate(walk(rows, passes), start=1):
        if kind == "open":
            with opening(), torch.no_grad():
                model(row.to(device), prefix=prefix, score=False)
        else:
            learn(row.to(device), prefix, number == len(passes))


@torch.no_grad()
def score_rows(model: nn.Module, rows: Sequence[PackedTrees], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Compute the (A,) log-probs and (A,) entropies of each row under the model's present weights, on the rows' device.

    Every row is forwarded once. An opened row is scored when it is opened, and its closing is left out.
    """
    training = model.training
    model.eval()
    scores = []
    for kind, row, prefix in walk(rows, plan_passes([rows])[0]):
        if kind != "close":
            logprob, entropy = model(row.to(device), None, prefix)
            home = row.input_ids.device
            scores.append((logprob.to(home), entropy.to(home)))
    model.train(training)
    return scores


def accumulate_gradients(policy: Policy, rows: Sequence[PackedTrees], objective: Objective) -> Tensor:
    """Add the gradients of a mini-batch to the parameters' on one process, for trainers that do without DeepSpeed.

    Args:
        policy: its parameters' `grad` fields are added to.
        rows: all rows of the mini-batch, as `pack_trees` gave them.
        objective: the loss.

    Returns:
        The () loss of all rows, float64, detached, without the losses of routers.
    """
    total = torch.zeros((), dtype=torch.float64, device=policy.device)

    def learn(row: PackedTrees, prefix: RowPrefix, last: bool) -> None:
        loss = policy(row, objective, prefix).loss
        loss.backward()
        total.add_(loss.detach())

    if policy.router_loss is not None:
        policy.router_loss.begin(rows)
    run_passes(policy, rows, plan_passes([rows])[0], policy.device, learn)
    return total
