"""Which turns are packed, and where: pruning, and cutting of trees over the row budget (docs/design.md#cutting)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from atpo_fast.objective import Objective
from atpo_fast.packing import depth_first
from atpo_fast.packing.depth_first import Piece, cut_depth_first
from atpo_fast.packing.weights import ForestWeights
from atpo_fast.tree.forest import Bools, Forest, Ints, offsets, ranges


@dataclass(slots=True)
class Cut:
    """The pieces into which trees are cut.

    A turn has one copy (C) in every piece that contains it: several where its tree was cut into pieces that repeat
    their ancestors.
    """

    kept: Bools  # (N,) turns that are packed
    length: Ints  # (N,) tokens packed of each turn
    copy_turn: Ints  # (C,)
    copy_piece: Ints  # (C,) sorted
    repeated: Bools  # (C,) whether the turn was in an earlier piece already
    piece_of_turn: Ints  # (N,) first piece of a kept turn, -1 for others
    piece_tokens: Ints  # (pieces,)
    piece_depth: Ints  # (pieces,) number of opened pieces above, whose tokens it reads as a prefix
    piece_prefix: Ints  # (pieces,) number of tokens of those
    piece_own_row: Bools  # (pieces,) whether its tree is cut depth-first: it is a row of its own, in this order


def turns_to_keep(forest: Forest, weights: ForestWeights, objective: Objective, prune: bool) -> Bools:
    """Choose the turns to pack, (N,): those of trees with trajectories, without the subtrees that have no gradient.

    Nothing is pruned without `prune`, nor under an objective in which every token counts.
    """
    if not prune or objective.every_token_counts:
        return np.bincount(forest.tree[forest.leaves], minlength=len(forest.names))[forest.tree] > 0
    if objective.loss_config.level == "sequence":  # one ratio per trajectory: all of it or nothing
        used = np.zeros(len(forest.parent), dtype=np.int64)
        entry = (weights.path_pos != 0) | (weights.path_neg != 0)
        used[forest.leaves[np.unique(forest.path_leaf[entry])]] = 1
    else:
        used = np.diff(offsets((weights.pos != 0) | (weights.neg != 0))[forest.action_offsets])
    return forest.sum_up(used) > 0


def cut_trees(forest: Forest, kept: Bools, max_tokens: int, max_prefix: int = 0) -> Cut:
    """Cut the trees over the budget, each in the way that costs less.

    Either into runs of neighbouring paths that repeat as few ancestor tokens as possible, or depth-first into pieces
    that read their ancestors' keys and values, at most `max_prefix` tokens of them.

    Raises ValueError when a single path is longer than a row and `max_prefix` does not allow for the rest.
    """
    length = _packed_lengths(forest, kept)
    paths = _Paths.of(forest, kept, length)
    opening = [piece for plan in _depth_first(forest, kept, length, paths, max_tokens, max_prefix) for piece in plan]
    others = kept & ~np.isin(forest.tree, [forest.tree[piece.turns[0]] for piece in opening])
    if opening:
        paths = _Paths.of(forest, others, length)
    _check_paths(forest, paths, max_tokens)
    cut = _repeat_ancestors(forest, others, length, paths, max_tokens)
    return _with_pieces(cut, kept, opening) if opening else cut


def _packed_lengths(forest: Forest, kept: Bools) -> Ints:
    """Count the tokens to pack of each turn, (N,): without its observation when every turn that reads it was pruned."""
    children = np.bincount(forest.parent[forest.parent >= 0], minlength=len(kept))
    below = kept & (forest.parent >= 0)
    kept_children = np.bincount(forest.parent[below], minlength=len(kept))
    unread = (children > 0) & (kept_children == 0)
    return np.where(kept, forest.action_length + np.where(unread, 0, forest.observation_length), 0)


@dataclass(slots=True)
class _Paths:
    """The paths to the kept turns without kept children, in pre-order (E)."""

    terminals: Ints  # (E,) turns at the ends of the paths
    first: Ints  # (N,) first path through each turn's subtree
    last: Ints  # (N,) last path through it
    cost: Ints  # (E,) number of tokens of the path
    shared: Ints  # (E,) number of its tokens that are on the previous path too

    @classmethod
    def of(cls, forest: Forest, kept: Bools, length: Ints) -> _Paths:
        """Collect the paths of the kept turns."""
        terminals, first, last = _terminals(forest, kept)
        return cls(terminals, first, last, *_path_costs(forest, length, terminals))


def _repeat_ancestors(forest: Forest, kept: Bools, length: Ints, paths: _Paths, max_tokens: int) -> Cut:
    """Cut every tree over the budget into pieces that repeat their ancestors."""
    new_piece = _piece_starts(forest.tree[paths.terminals], paths.cost, paths.shared, max_tokens)
    piece_of_terminal = np.cumsum(new_piece) - 1
    turn = np.flatnonzero(kept)
    turn = turn[np.argsort(forest.order[turn])]
    first_piece, last_piece = piece_of_terminal[paths.first[turn]], piece_of_terminal[paths.last[turn]]
    copies = last_piece - first_piece + 1
    copy_turn, copy_piece = np.repeat(turn, copies), ranges(first_piece, copies)
    repeated = copy_piece > np.repeat(first_piece, copies)
    by_piece = np.argsort(copy_piece, kind="stable")
    piece_of_turn = np.full(len(kept), -1, dtype=np.int64)
    piece_of_turn[turn] = first_piece
    pieces = int(new_piece.sum())
    none = np.zeros(pieces, dtype=np.int64)
    return Cut(
        kept=kept,
        length=length,
        copy_turn=copy_turn[by_piece],
        copy_piece=copy_piece[by_piece],
        repeated=repeated[by_piece],
        piece_of_turn=piece_of_turn,
        piece_tokens=np.bincount(copy_piece, weights=length[copy_turn], minlength=pieces).astype(np.int64),
        piece_depth=none,
        piece_prefix=none,
        piece_own_row=none > 0,
    )


def _depth_first(
    forest: Forest, kept: Bools, length: Ints, paths: _Paths, max_tokens: int, max_prefix: int
) -> list[list[Piece]]:
    """Cut each tree depth-first for which this is possible and cheaper than to repeat ancestors."""
    chosen = []
    tree = forest.tree[paths.terminals]
    total = np.bincount(tree, weights=paths.cost - paths.shared)
    for over in np.flatnonzero(total > max_tokens) if max_prefix else []:
        plan = cut_depth_first(forest, kept, length, int(np.flatnonzero(forest.tree == over)[0]), max_tokens)
        possible = plan.longest_row <= max_tokens and plan.longest_prefix <= max_prefix
        if possible and plan.cost < _repeated_cost(paths, np.flatnonzero(tree == over), max_tokens):
            chosen.append(plan.pieces)
    return chosen


def _repeated_cost(paths: _Paths, member: Ints, max_tokens: int) -> float:
    """Compute what repeating ancestors costs a tree, in the unit of `DepthFirst.cost`; `member` are its paths."""
    cost, shared = paths.cost[member], paths.shared[member]
    if cost.max() > max_tokens:
        return np.inf
    starts = _cheapest_cut(cost, shared, max_tokens)
    return float(shared[starts].sum() + depth_first.ROW_TOKENS * starts.sum())


def _with_pieces(cut: Cut, kept: Bools, pieces: list[Piece]) -> Cut:
    """Append further pieces to those of `cut`."""
    counts = np.array([len(piece.turns) for piece in pieces])
    turn = np.concatenate([piece.turns for piece in pieces])
    number = len(cut.piece_tokens) + np.repeat(np.arange(len(pieces)), counts)
    cut.piece_of_turn[turn] = number
    tokens = np.add.reduceat(cut.length[turn], offsets(counts)[:-1])
    return replace(
        cut,
        kept=kept,
        copy_turn=np.append(cut.copy_turn, turn),
        copy_piece=np.append(cut.copy_piece, number),
        repeated=np.append(cut.repeated, np.zeros(len(turn), dtype=bool)),
        piece_tokens=np.append(cut.piece_tokens, tokens),
        piece_depth=np.append(cut.piece_depth, [piece.depth for piece in pieces]),
        piece_prefix=np.append(cut.piece_prefix, [piece.prefix_tokens for piece in pieces]),
        piece_own_row=np.append(cut.piece_own_row, np.ones(len(pieces), dtype=bool)),
    )


def _terminals(forest: Forest, kept: Bools) -> tuple[Ints, Ints, Ints]:
    """Find the kept turns without kept children, (E,) in pre-order, and the first and last of them under each, (N,)."""
    below = kept & (forest.parent >= 0)
    terminal = kept & (np.bincount(forest.parent[below], minlength=len(kept)) == 0)
    terminals = np.flatnonzero(terminal)
    terminals = terminals[np.argsort(forest.order[terminals])]
    ranks = forest.order[terminals]
    first = np.searchsorted(ranks, forest.order)
    last = np.searchsorted(ranks, forest.order + forest.subtree_size) - 1
    return terminals, first, last


def _path_costs(forest: Forest, length: Ints, terminals: Ints) -> tuple[Ints, Ints]:
    """Count the tokens of each terminal's path, (E,), and those of them on the previous terminal's path too, (E,)."""
    cost = forest.prefix_length[terminals] + length[terminals]
    shared = np.zeros(len(terminals), dtype=np.int64)
    if len(terminals) > 1:
        # turns visited between two neighbouring terminals are exactly those that are new on the second path
        kept_order = np.full(len(length) + 1, 0, dtype=np.int64)
        kept_order[forest.order + 1] = length
        walked = np.cumsum(kept_order)[forest.order[terminals] + 1]
        shared[1:] = cost[1:] - np.diff(walked)
    shared[np.diff(forest.tree[terminals], prepend=-1) != 0] = 0
    return cost, shared


def _check_paths(forest: Forest, paths: _Paths, max_tokens: int) -> None:
    """Raise ValueError, naming tree, turn and remedy, for a path that is longer than a row."""
    terminals, cost = paths.terminals, paths.cost
    long = np.flatnonzero(cost > max_tokens)
    if not long.size:
        return
    worst = int(long[np.argmax(cost[long])])
    turn = int(terminals[worst])
    first, above = turn, int(forest.parent[turn])
    while above >= 0:  # the first turn on the path with an action
        first = above if forest.action_length[above] else first
        above = int(forest.parent[above])
    prompt = int(forest.prefix_length[first])
    raise ValueError(
        f"tree {forest.names[forest.tree[turn]]}: the path to turn {forest.index[turn]} has {cost[worst]} tokens "
        f"({prompt} of the prompt + {cost[worst] - prompt} of the response) and does not fit in a row of {max_tokens}; "
        f"raise train.row_tokens to at least {cost[worst]}, or train.prefix_memory_gb for the keys of its ancestors"
    )


def _piece_starts(tree: Ints, cost: Ints, shared: Ints, max_tokens: int) -> Bools:
    """Decide at which paths a piece starts, (E,); trees within the budget are one piece."""
    starts = np.diff(tree, prepend=-1) != 0
    total = np.bincount(tree, weights=cost - shared)
    for over in np.flatnonzero(total > max_tokens):
        member = np.flatnonzero(tree == over)
        starts[member] = _cheapest_cut(cost[member], shared[member], max_tokens)
    return starts


def _cheapest_cut(cost: Ints, shared: Ints, max_tokens: int) -> Bools:
    """Choose the paths of one tree at which pieces start, by a dynamic program; a start at i repeats `shared[i]`."""
    count = len(cost)
    grown = np.cumsum(cost - shared)  # tokens of the paths 0..i without repeats
    size_offset = cost - grown  # piece i..j has size_offset[i] + grown[j] tokens
    best = np.zeros(count + 1)  # best[j]: fewest repeated tokens for the first j paths
    previous = np.zeros(count + 1, dtype=np.int64)
    low = 0
    for end in range(1, count + 1):
        while size_offset[low] + grown[end - 1] > max_tokens:
            low += 1
        options = best[low:end] + shared[low:end]
        choice = low + int(np.argmin(options))
        best[end], previous[end] = options[choice - low], choice
    starts = np.zeros(count, dtype=bool)
    end = count
    while end > 0:
        end = int(previous[end])
        starts[end] = True
    return starts
