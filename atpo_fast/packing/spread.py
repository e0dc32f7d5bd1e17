"""Fill rows with pieces of trees, and spread rows over ranks (docs/design.md#spreading)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from atpo_fast.tree.forest import Bools, Ints
from atpo_fast.tree.packed_rows import PackedTrees, empty_row

PAIRS_PER_TOKEN = 12288.0
"""FLOPs of a token's linear layers over FLOPs of one visible pair of the attention: about 6 x hidden size (2048)."""


def fill_rows(piece_tokens: Ints, max_tokens: int, own_row: Bools | None = None) -> Ints:
    """Choose the row of each piece, (pieces,): best fit, longest first.

    Rows are numbered in the order of their first piece.

    Args:
        piece_tokens: (pieces,) tokens of each.
        max_tokens: longest row.
        own_row: (pieces,) whether a piece shares its row with no other; none does if not given.
    """
    row = np.zeros(len(piece_tokens), dtype=np.int64)
    room: list[int] = []
    for piece in np.argsort(-piece_tokens, kind="stable").tolist():
        need = int(piece_tokens[piece])
        separate = own_row is not None and bool(own_row[piece])
        fitting = [] if separate else [(left - need, r) for r, left in enumerate(room) if left >= need]
        chosen = min(fitting)[1] if fitting else len(room)
        if not fitting:
            room.append(-1 if separate else max_tokens)
        room[chosen] -= need
        row[piece] = chosen
    _, first, number = np.unique(row, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number]


def spread_rows(
    rows: Sequence[PackedTrees], ranks: int, *, pairs_per_token: float = PAIRS_PER_TOKEN
) -> list[list[PackedTrees]]:
    """Distribute rows over ranks: one list per rank, all of the same length (at least one), balanced by cost.

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
    """Group rows that stay together: one without rows above, and those below it."""
    units: list[list[PackedTrees]] = []
    for row in rows:
        if row.depth:
            units[-1].append(row)
        else:
            units.append([row])
    return units


def row_cost(row: PackedTrees, pairs_per_token: float = PAIRS_PER_TOKEN) -> float:
    """Estimate the cost of a row, its linear layers and its attention, in visible query-key pairs."""
    keys = torch.arange(row.num_tokens, device=row.subtree_end.device)
    seen = float((row.subtree_end - keys).sum())
    return row.num_tokens * (pairs_per_token + row.prefix_tokens) + seen
