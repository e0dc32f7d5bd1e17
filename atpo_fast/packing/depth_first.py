"""Trees over the row budget, worked off depth-first in pieces that read their ancestors' keys and values (design, 5).

A turn whose subtree exceeds the budget is *opened*: it gets a row of its own, whose keys and values are kept while the
rows below it are worked off. Its other children go together into rows that see the opened turns above as a prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atpo_fast.packing.rows import fill_rows
from atpo_fast.tree.forest import Bools, Forest, Ints

ROW_TOKENS = 1024
"""A row that holds almost nothing costs about what this many tokens cost: launches, and under ZeRO gathered weights."""
OPENED_SHARE = 1 / 3
"""Of a token's forward and backward, what opening costs: one more forward (none with checkpointed layers)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A row of one tree, without the turns above it."""

    turns: Ints  # (n,) in pre-order
    depth: int  # opened rows above
    prefix_tokens: int  # tokens of those
    opened: bool


@dataclass(frozen=True, slots=True)
class DepthFirst:
    """A tree in pieces, an opened one before those below it."""

    pieces: list[Piece]
    longest_row: int  # tokens
    longest_prefix: int  # tokens
    cost: float
    """What it costs beyond its tokens, in tokens forwarded and back-propagated."""


def work_off(forest: Forest, kept: Bools, length: Ints, root: int, max_tokens: int) -> DepthFirst:
    """The pieces of the tree at `root` whose rows hold at most `max_tokens` tokens (but for longer turns).

    Args:
        kept: (N,) turns that are packed.
        length: (N,) tokens packed of each turn.
    """
    size = forest.sum_up(length)
    pieces: list[Piece] = []

    def children(turn: int) -> Ints:
        found = np.flatnonzero(kept & (forest.parent == turn))
        return found[np.argsort(forest.order[found])]

    def descend(siblings: Ints, depth: int, prefix: int) -> None:
        small, big = siblings[size[siblings] <= max_tokens], siblings[size[siblings] > max_tokens]
        row = fill_rows(size[small], max_tokens)
        for number in range(int(row.max(initial=-1)) + 1):
            pieces.append(Piece(_subtrees(forest, kept, small[row == number]), depth, prefix, False))
        for turn in big.tolist():
            chain, below = [turn], children(turn)
            while len(below) == 1 and size[below[0]] > max_tokens >= length[[*chain, below[0]]].sum():
                chain.append(int(below[0]))
                below = children(chain[-1])
            tokens = int(length[chain].sum())
            if tokens:
                pieces.append(Piece(np.array(chain), depth, prefix, len(below) > 0))
            descend(below, depth + (tokens > 0), prefix + tokens)

    descend(np.array([root]), 0, 0)
    opened = sum(int(length[piece.turns].sum()) for piece in pieces if piece.opened)
    rows = len(pieces) + sum(piece.opened for piece in pieces)
    return DepthFirst(
        pieces=pieces,
        longest_row=max(int(length[piece.turns].sum()) for piece in pieces),
        longest_prefix=max(piece.prefix_tokens for piece in pieces),
        cost=OPENED_SHARE * opened + ROW_TOKENS * rows,
    )


def _subtrees(forest: Forest, kept: Bools, roots: Ints) -> Ints:
    """The kept turns of several subtrees, in pre-order."""
    ranks = np.concatenate([np.arange(forest.order[r], forest.order[r] + forest.subtree_size[r]) for r in roots])
    by_rank = np.argsort(forest.order)
    turns = by_rank[np.sort(ranks)]
    return turns[kept[turns]]
