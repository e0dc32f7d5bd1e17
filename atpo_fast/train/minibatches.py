"""From the forest of a step to the rows of its mini-batches, one optimizer step each."""

from __future__ import annotations

from typing import NamedTuple

from atpo_fast.objective import Objective
from atpo_fast.packing import pack_trees, pruned_tokens, spread_rows
from atpo_fast.policy.opened_rows.plan import Pass, plan_passes
from atpo_fast.tree import Forest
from atpo_fast.tree.packed_rows import PackedTrees


class MiniBatch(NamedTuple):
    """The part of a mini-batch that one rank computes."""

    rows: list[PackedTrees]  # rows; none where no token has a gradient, on any rank
    passes: list[Pass]
    pruned: int  # tokens of the mini-batch's trees, on all ranks, that packing left out


def pack_minibatches(
    forest: Forest,
    objective: Objective,
    questions: int,
    *,
    row_tokens: int,
    max_prefix: int = 0,
    rank: int = 0,
    world: int = 1,
) -> list[MiniBatch]:
    """Cut the forest into mini-batches and pack each, alike on all ranks; the trees are not read again.

    Args:
        forest: the trees of all ranks after `assign_credit`.
        objective: as in `pack_trees`.
        questions: trees of a mini-batch; the last one may have fewer.
        row_tokens: longest row.
        max_prefix: as in `pack_trees`.
        rank: the rank whose rows are returned.
        world: number of ranks.

    Raises:
        ValueError: as `pack_trees`.
    """
    batches = []
    for first in range(0, len(forest.trees), questions):
        part = forest.part(first, min(first + questions, len(forest.trees)))
        rows = pack_trees(part, objective, row_tokens, max_prefix=max_prefix)
        spread = spread_rows(rows, world) if rows else [[] for _ in range(world)]
        batches.append(MiniBatch(spread[rank], plan_passes(spread)[rank], pruned_tokens(part.trees, rows)))
    return batches
