"""Filling of rows (design, section 5)."""

from __future__ import annotations

import numpy as np

from atpo_fast.tree.forest import Bools, Ints


def fill_rows(piece_tokens: Ints, max_tokens: int, alone: Bools | None = None) -> Ints:
    """(pieces,) row of each piece: best fit, longest first; rows are numbered in the order of their first piece.

    A piece that is `alone` shares its row with no other.
    """
    row = np.zeros(len(piece_tokens), dtype=np.int64)
    room: list[int] = []
    for piece in np.argsort(-piece_tokens, kind="stable").tolist():
        need = int(piece_tokens[piece])
        apart = alone is not None and bool(alone[piece])
        fitting = [] if apart else [(left - need, r) for r, left in enumerate(room) if left >= need]
        chosen = min(fitting)[1] if fitting else len(room)
        if not fitting:
            room.append(-1 if apart else max_tokens)
        room[chosen] -= need
        row[piece] = chosen
    _, first, number = np.unique(row, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number]
