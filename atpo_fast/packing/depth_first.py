"""Cut trees depth-first into pieces that read their ancestors' keys and values (docs/design.md#opened-rows).

A turn whose subtree exceeds the budget is *opened*: it gets a row of its own, whose keys and values are kept while the
rows below it are computed. Its other children go together into rows that see the opened turns above as a prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atpo_fast.packing.spread import fill_rows
from atpo_fast.tree.forest import Bools, Forest, Ints

ROW_TOKENS = 1024
"""Cost of a row that holds almost nothing, in tokens: kernel launches, and under ZeRO the gathering of weights."""
OPENING_COST = 1 / 3
"""Cost of opening a token, in forwards and backwards of it: one more forward (none with checkpointed layers)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Turns of one tree that make a row, without those above them."""

    turns: Ints  # (n,) turns in pre-order
    depth: int  # number of opened rows above
    prefix_tokens: int  # number of tokens of those
    opened: bool


@dataclass(frozen=True, slots=True)
class DepthFirst:
    """A tree in pieces, each opened one before those below it."""

    pieces: list[Piece]
    longest_row: int  # number of tokens of the longest row
    longest_prefix: int  # number of tokens of the longest prefix
    cost: float
    """Cost beyond its own tokens, in tokens forwarded and back-propagated."""


def cut_depth_first(forest: Forest, kept: Bools, length: Ints, root: int, max_tokens: int) -> DepthFirst:
    """Cut the tree at `root` into pieces of at most `max_tokens` tokens (but for longer turns).

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
        cost=OPENING_COST * opened + ROW_TOKENS * rows,
    )


def _subtrees(forest: Forest, kept: Bools, roots: Ints) -> Ints:
    """List the kept turns of the subtrees at `roots`, in pre-order."""
    ranks = np.concatenate([np.arange(forest.order[r], forest.order[r] + forest.subtree_size[r]) for r in roots])
    by_rank = np.argsort(forest.order)
    turns = by_rank[np.sort(ranks)]
    return turns[kept[turns]]
