"""The gradient of a mini-batch on one process, for trainers that do without DeepSpeed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atpo_fast.objective import Objective
from atpo_fast.packing import PackedTrees
from atpo_fast.policy.opened_rows.plan import plan_passes
from atpo_fast.policy.opened_rows.prefix import walk
from atpo_fast.policy.policy import Policy


def accumulate_gradients(policy: Policy, rows: Sequence[PackedTrees], objective: Objective) -> Tensor:
    """Forward and backward over the rows of a mini-batch, as `pack_trees` gave them; adds to the parameters' gradients.

    Returns the () loss of all rows, detached.
    """
    total = torch.zeros((), dtype=torch.float64, device=policy.device)
    for kind, row, prefix in walk(rows, plan_passes([rows])[0]):
        row = row.to(policy.device)
        if kind == "open":
            with torch.no_grad():
                policy(row, prefix=prefix, score=False)
            continue
        loss = policy(row, objective, prefix).loss
        loss.backward()
        total += loss.detach()
    return total
