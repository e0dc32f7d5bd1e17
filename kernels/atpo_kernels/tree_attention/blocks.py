"""Which queries of a row of trees are worked on together, and which keys they see."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

# Cost of a block of B queries and K keys in units of one (query, key) pair, fitted on CPU to trees of 8-600 token
# turns: a fixed part for the calls, and a part per row and column for small matrix products and copies.
_CALL_COST = 3000
_EDGE_COST = 32
_GRID = 32  # a turn longer than this may be cut at its multiples


@dataclass(slots=True, frozen=True)
class TreeBlocks:
    """Blocks of consecutive queries of one row; block i holds the queries [starts[i], starts[i+1]).

    Its keys are the ranges `full[i]`, seen by every query of the block, and then `partial[i]`, seen by some, of which
    the last is the block's own range. Ranges hold every key that any query of the block sees. They count the prefix,
    which is the first full range if there is one: query i is key prefix + i.
    """

    prefix: int
    starts: list[int]
    full: list[list[tuple[int, int]]]
    partial: list[list[tuple[int, int]]]

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return self.starts[-1]

    @property
    def pairs(self) -> int:
        """(query, key) pairs that are computed."""
        sizes = np.diff(self.starts)
        keys = [sum(hi - lo for lo, hi in f + p) for f, p in zip(self.full, self.partial, strict=True)]
        return int((sizes * keys).sum())


def make_tree_blocks(subtree_end: Tensor, max_queries: int = 128, prefix: int = 0) -> TreeBlocks:
    """Blocks for `tree_attention(impl="torch")`, made once per row (T,) behind a prefix and used by every layer.

    Borders are chosen among turn starts and steps inside long turns so that the computed pairs plus the fixed costs
    are least. Reads subtree_end on the host. Raises ValueError if subtree_end is not that of depth-first pre-order.
    """
    end = subtree_end.detach().cpu().numpy().astype(np.int64)
    tokens = len(end)
    index = np.arange(tokens)
    if np.any(end <= index) or np.any(end > tokens):
        raise ValueError("make_tree_blocks: subtree_end[k] must lie in (k, T]")
    closed = np.cumsum(np.bincount(end, minlength=tokens + 1))
    open_before = index - closed[:tokens]  # keys before the token whose subtree holds it
    starts = _choose_starts(end, open_before + prefix, max_queries)
    root = np.maximum.accumulate(np.where(open_before == 0, index, 0))
    full, partial = [], []
    for start, stop in pairwise(starts):
        first = int(root[start])
        before, key = end[first:start], prefix + first
        full.append([(0, prefix)] * (prefix > 0) + _ranges(np.flatnonzero(before >= stop) + key))
        some = _ranges(np.flatnonzero((before > start) & (before < stop)) + key)
        partial.append([*some, (prefix + start, prefix + stop)])
    return TreeBlocks(prefix, starts, full, partial)


def _choose_starts(end: np.ndarray, keys_before: np.ndarray, max_queries: int) -> list[int]:
    """Least-cost borders, by dynamic programming from left to right over the possible ones."""
    borders = _possible_borders(end, min(_GRID, max_queries))
    reach = np.searchsorted(borders, borders - max_queries, side="left")
    cost = np.zeros(len(borders))
    previous = np.zeros(len(borders), dtype=np.int64)
    edged = np.append(keys_before, 0)[borders] + _EDGE_COST
    for j in range(1, len(borders)):
        left = int(reach[j])
        sizes = borders[j] - borders[left:j]
        total = cost[left:j] + (sizes + _EDGE_COST) * (sizes + edged[left:j])
        best = int(total.argmin())
        cost[j], previous[j] = total[best] + _CALL_COST, left + best
    chosen = [len(borders) - 1]
    while chosen[-1] > 0:
        chosen.append(int(previous[chosen[-1]]))
    return borders[chosen[::-1]].tolist()


def _possible_borders(end: np.ndarray, grid: int) -> np.ndarray:
    """0, T, the starts of turns, and every `grid` tokens inside a turn."""
    if len(end) == 0:
        return np.zeros(1, dtype=np.int64)
    turns = np.flatnonzero(np.diff(end, prepend=-1) != 0)
    since_start = np.arange(len(end)) - np.repeat(turns, np.diff(turns, append=len(end)))
    return np.append(np.flatnonzero(since_start % grid == 0), len(end))


def _ranges(indices: np.ndarray) -> list[tuple[int, int]]:
    """Increasing indices as (first, after last) of their runs."""
    if len(indices) == 0:
        return []
    cuts = np.flatnonzero(np.diff(indices) > 1)
    first = indices[np.concatenate([[0], cuts + 1])]
    last = indices[np.concatenate([cuts, [len(indices) - 1]])] + 1
    return list(zip(first.tolist(), last.tolist(), strict=True))
