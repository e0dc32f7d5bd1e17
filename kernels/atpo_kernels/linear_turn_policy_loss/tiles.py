"""How the rows of a call are cut into chunks, and how many of them a kernel works on at a time.

A chunk never cuts a turn: as the ratio of a turn is known once all its log-probs are, its gradients can then be formed
from the logits that are still there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

KEPT_BLOCK = 1024  # rows that the search for rows with gradient looks at together
WORTH_COPYING = 0.85  # in PyTorch, tokens are skipped when fewer than this share of a chunk has a gradient


@dataclass(slots=True, frozen=True)
class GradientTile:
    """What a program that turns exponentials into gradients works on at a time."""

    rows: int
    parts: int = 1
    """Programs that share a tile of columns of the statistics."""
    prefetch: bool = False
    """Whether the rows of the next step are loaded before those of this one are stored."""


# 16 rows x 256 columns are 8 KiB in flight a program
GRADIENT_TILES = {"gpu": GradientTile(16), "cpu": GradientTile(4)}


def gradient_tile(device: torch.device) -> GradientTile:
    """Look up the tile of the gradients in place of the exponentials."""
    return GRADIENT_TILES["gpu" if device.type == "cuda" else "cpu"]


@dataclass(slots=True, frozen=True)
class Chunk:
    """Rows and turns that are processed together."""

    rows: slice
    """Rows of the call."""
    turns: slice
    """Turns of the call."""
    fits: bool
    """Whether the rows fit into the chunk buffer; if not, they are one long turn."""


def plan_chunks(turn_offsets: np.ndarray, max_rows: int, cut_turns: bool) -> list[Chunk]:
    """Plan chunks of at most `max_rows` rows in order; with `cut_turns` (ratio level token) borders may fall anywhere.

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
