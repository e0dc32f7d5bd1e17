"""From trees with credit to packed rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atpo_fast.objective import Objective
from atpo_fast.packing.clip_ranges import turn_clip_ranges
from atpo_fast.packing.cutting import cut_trees, turns_to_keep
from atpo_fast.packing.layout import write_rows
from atpo_fast.packing.spread import fill_rows
from atpo_fast.packing.weights import Weigh, tree_weights
from atpo_fast.tree import Forest, TurnTree, as_forest
from atpo_fast.tree.packed_rows import PackedTrees


def pack_trees(
    trees: Sequence[TurnTree] | Forest,
    objective: Objective,
    max_tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
    prune: bool = True,
    max_prefix: int = 0,
) -> list[PackedTrees]:
    """Lay trees out in rows of at most `max_tokens` tokens (docs/design.md#packing).

    Give all trees of the mini-batch, of all ranks: the averages of the objective run over them, and the losses of the
    rows sum to the batch loss. A tree over the budget is cut into rows that repeat their ancestors with weight 0 or,
    where that costs less, into rows that read their ancestors' keys and values: an opened row, and right after it the
    rows below it, of greater `depth`.

    Args:
        trees: trees after `assign_credit`, or their table (`as_forest`). A tree without leaves is left out.
        objective: aggregation, denominator and ratio level.
        max_tokens: longest row.
        dtype: of the floating-point fields.
        prune: leave out subtrees without gradient; they still count in the averages. Their number of tokens is
            `pruned_tokens(trees, rows)`.
        max_prefix: ancestor tokens whose keys and values may be kept while the rows below them are computed. Trees
            repeat their ancestors at 0, and under ratio level `sequence` or denominator `local`, whose trajectories
            have to lie whole in a row.

    Returns:
        The rows, none when nothing has a gradient.

    Raises:
        ValueError: no credit; an advantage that is not finite; clip ranges of turns that the objective cannot use; a
            path too long for `max_tokens` and `max_prefix`; an action token without any token before it.
    """
    forest = as_forest(trees)
    if not forest.trees:
        return []
    weigh = tree_weights(forest, objective)
    return pack_forest(forest, weigh, objective, max_tokens, dtype=dtype, prune=prune, max_prefix=max_prefix)


def pack_forest(
    forest: Forest,
    weigh: Weigh,
    objective: Objective,
    max_tokens: int,
    *,
    dtype: torch.dtype,
    prune: bool,
    max_prefix: int = 0,
) -> list[PackedTrees]:
    """Lay a forest out in rows under given weights; arguments, result and errors are those of `pack_trees`."""
    weights = weigh(None)
    kept = turns_to_keep(forest, weights, objective, prune)
    cut = cut_trees(forest, kept, max_tokens, 0 if objective.whole_trajectories else max_prefix)
    row_of_piece = fill_rows(cut.piece_tokens, max_tokens, cut.piece_own_row)
    if objective.denominator == "local":
        weights = weigh(row_of_piece[cut.piece_of_turn[forest.leaves]])
    return write_rows(forest, cut, row_of_piece, weights, turn_clip_ranges(forest, objective), dtype)


def pruned_tokens(trees: Sequence[TurnTree], rows: Sequence[PackedTrees]) -> int:
    """Count the tokens of the trees that the rows left out."""
    return sum(tree.unique_tokens for tree in trees) - sum(row.unique_tokens for row in rows)
