"""From the forest of a step to the rows of its mini-batches, one optimizer step each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
    trees: Sequence[int],
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
        trees: number of trees of each mini-batch, in the order of the forest (`trees_per_minibatch`).
        row_tokens: longest row.
        max_prefix: as in `pack_trees`.
        rank: the rank whose rows are returned.
        world: number of ranks.

    Raises:
        ValueError: as `pack_trees`; the numbers of trees do not sum to those of the forest.
    """
    if sum(trees) != len(forest.trees):
        raise ValueError(f"mini-batches of {sum(trees)} trees were asked of a forest of {len(forest.trees)}")
    batches = []
    for first, last in itertools.pairwise([0, *itertools.accumulate(trees)]):
        part = forest.part(first, last)
        rows = pack_trees(part, objective, row_tokens, max_prefix=max_prefix)
        spread = spread_rows(rows, world) if rows else [[] for _ in range(world)]
        batches.append(MiniBatch(spread[rank], plan_passes(spread)[rank], pruned_tokens(part.trees, rows)))
    return batches


def trees_per_minibatch(trees_of_questions: Sequence[int], questions: int) -> list[int]:
    """Count the trees of each mini-batch of `questions` whole questions; the last one may have fewer questions."""
    return [
        sum(trees_of_questions[first : first + questions]) for first in range(0, len(trees_of_questions), questions)
    ]
