"""Where to cut the rows into chunks without cutting a turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(slots=True, frozen=True)
class Chunk:
    """Rows and turns of one chunk."""

    rows: slice
    turns: slice
    fits: bool  # whether the rows fit into the chunk buffer; if not, it is one long turn


def plan_chunks(turn_offsets: np.ndarray, max_rows: int, cut_turns: bool) -> list[Chunk]:
    """Chunks of at most `max_rows` rows in order; with `cut_turns` (ratio level token) borders may fall anywhere.

    turn_offsets: (N+1,). A turn of more than `max_rows` rows is a chunk of its own that does not fit. Work is done per
    chunk, not per turn.
    """
    total, turns = int(turn_offsets[-1]), len(turn_offsets) - 1
    if cut_turns:
        starts = range(0, total, max_rows)
        return [Chunk(slice(start, min(start + max_rows, total)), slice(0, turns), True) for start in starts]
    chunks, first = [], 0
    while first < turns:
        start = int(turn_offsets[first])
        last = int(np.searchsorted(turn_offsets, start + max_rows, side="right")) - 1
        fits = last > first
        last = last if fits else first + 1
        end = int(turn_offsets[last])
        if end > start:
            chunks.append(Chunk(slice(start, end), slice(first, last), fits))
        first = last
    return chunks
