"""Spreading rows over ranks (design, section 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atpo_fast.packing.packed_trees import PackedTrees

PAIRS_PER_TOKEN = 12288.0
"""FLOPs of a token's linear layers over FLOPs of one visible pair of the attention: about 6 x hidden size (2048)."""


def spread_rows(
    rows: Sequence[PackedTrees], ranks: int, *, pairs_per_token: float = PAIRS_PER_TOKEN
) -> list[list[PackedTrees]]:
    """One list of rows per rank, all of the same length (at least one), balanced by cost.

    The i-th rows of all ranks run at the same time, so they are chosen to be alike, and within a step the longest row
    goes to the rank that has done least. A row stays with the rows above and below it. Empty rows fill up.

    Raises ValueError when `ranks` is not positive.
    """
    if ranks < 1:
        raise ValueError(f"spread_rows: ranks={ranks} must be at least 1")
    dtype = rows[0].weight_pos.dtype if rows else torch.float32
    units = [(len(unit), sum(row_cost(row, pairs_per_token) for row in unit), unit) for unit in _units(rows)]
    spread: list[list[PackedTrees]] = [[] for _ in range(ranks)]
    done = [0.0] * ranks
    for _, cost, unit in sorted(units, key=lambda u: u[:2], reverse=True):
        rank = min(range(ranks), key=lambda r: (len(spread[r]), done[r]))
        spread[rank] += unit
        done[rank] += cost
    most = max(1, *map(len, spread))
    return [[*mine, *(empty_row(dtype) for _ in range(most - len(mine)))] for mine in spread]


def _units(rows: Sequence[PackedTrees]) -> list[list[PackedTrees]]:
    """Rows that stay together: one without rows above, and those below it."""
    units: list[list[PackedTrees]] = []
    for row in rows:
        if row.depth:
            units[-1].append(row)
        else:
            units.append([row])
    return units


def row_cost(row: PackedTrees, pairs_per_token: float = PAIRS_PER_TOKEN) -> float:
    """Cost of a row in visible query-key pairs: its linear layers and its attention."""
    keys = torch.arange(row.num_tokens, device=row.subtree_end.device)
    seen = float((row.subtree_end - keys).sum())
    return row.num_tokens * (pairs_per_token + row.prefix_tokens) + seen


def empty_row(dtype: torch.dtype = torch.float32) -> PackedTrees:
    """A row that runs a real forward and backward and adds exactly 0: two tokens, one action token of weight 0."""
    zero = torch.zeros(1, dtype=dtype)
    index = torch.zeros(1, dtype=torch.int32)
    return PackedTrees(
        input_ids=torch.zeros(2, dtype=torch.int64),
        position_ids=torch.arange(2),
        subtree_end=torch.full((2,), 2, dtype=torch.int32),
        predictor=torch.zeros(1, dtype=torch.int64),
        targets=torch.zeros(1, dtype=torch.int64),
        old_logprob=zero.clone(),
        rollout_logprob=zero.clone(),
        ref_logprob=zero.clone(),
        turn_offsets=torch.tensor([0, 1], dtype=torch.int32),
        weight_pos=zero.clone(),
        weight_neg=zero.clone(),
        weight_all=zero.clone(),
        trajectory_count=zero.clone(),
        path_offsets=torch.tensor([0, 1], dtype=torch.int32),
        path_turns=index.clone(),
        path_weight_pos=zero.clone(),
        path_weight_neg=zero.clone(),
        leaf_multiplicity=zero.clone(),
        turn_tree=index - 1,
        turn_index=index - 1,
        leaf_turn=index - 1,
        leaf_tree=index - 1,
        unique_tokens=0,
        flat_tokens=0,
    )
