"""Write the rows: tokens in depth-first pre-order, predictors, offsets and path tables.

See docs/design.md#fields-of-a-row.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atpo_fast.packing.cutting import Cut
from atpo_fast.packing.weights import ForestWeights
from atpo_fast.tree.forest import Floats, Forest, Ints, offsets, ranges
from atpo_fast.tree.packed_rows import PackedTrees


@dataclass(slots=True)
class _Copies:
    """The packed copies of turns (C) in the order in which they are written, row after row."""

    turn: Ints  # (C,)
    repeated: NDArray[np.bool_]  # (C,)
    row_offsets: Ints  # (rows+1,) CSR over C
    start: Ints  # (C,) position in the row of the first token
    length: Ints  # (C,) tokens
    subtree_end: NDArray[np.int32]  # (C,) position in the row after the last token of the subtree
    before: Ints  # (C,) position in the row of the last token on the path before the turn; -1 if that is the prefix's
    key: Ints  # (C,) ascending: piece in writing order, then pre-order of the turn
    piece_key: Ints  # (pieces,) what to add to a turn's pre-order to get its key in a piece


def write_rows(
    forest: Forest,
    cut: Cut,
    row_of_piece: Ints,
    weights: ForestWeights,
    by_turn: dict[str, Floats],  # further fields of the rows: (N,) each
    dtype: torch.dtype,
) -> list[PackedTrees]:
    """Write the packed rows. Raises ValueError for an action token with nothing before it to predict it."""
    if not len(cut.piece_tokens):
        return []
    copies = _order_copies(forest, cut, row_of_piece)
    paths = _write_paths(forest, cut, copies, weights, row_of_piece, dtype)
    rows = []
    first_pieces = np.unique(row_of_piece, return_index=True)[1]  # the only piece of rows with a prefix
    bounds = itertools.pairwise(copies.row_offsets.tolist())
    for table, first, (low, high) in zip(paths, first_pieces, bounds, strict=True):
        mine = slice(low, high)
        rows.append(
            PackedTrees(
                **_token_fields(forest, cut, copies, mine),
                **_action_fields(forest, weights, by_turn, copies, mine, dtype),
                **table,
                unique_tokens=int(copies.length[mine] @ ~copies.repeated[mine]),
                depth=int(cut.piece_depth[first]),
                prefix_tokens=int(cut.piece_prefix[first]),
            )
        )
    return rows


def _order_copies(forest: Forest, cut: Cut, row_of_piece: Ints) -> _Copies:
    """Order the copies by row, piece and pre-order, and find where their tokens lie in their rows."""
    order = np.lexsort((forest.order[cut.copy_turn], cut.copy_piece, row_of_piece[cut.copy_piece]))
    turn, piece = cut.copy_turn[order], cut.copy_piece[order]
    row_offsets = offsets(np.bincount(row_of_piece[piece]))
    writing_order = np.argsort(np.lexsort((np.arange(len(row_of_piece)), row_of_piece)))
    piece_key = writing_order * len(forest.parent)
    key = piece_key[piece] + forest.order[turn]
    length = cut.length[turn]
    end = np.cumsum(length)
    row_start = np.repeat(np.append(0, end)[row_offsets[:-1]], np.diff(row_offsets))
    last = np.searchsorted(key, key + forest.subtree_size[turn]) - 1
    before = _last_token_before(forest, turn, key, end)
    return _Copies(
        turn=turn,
        repeated=cut.repeated[order],
        row_offsets=row_offsets,
        start=end - length - row_start,
        length=length,
        subtree_end=(end[last] - row_start).astype(np.int32),
        before=np.where(before < 0, -1, before - row_start),
        key=key,
        piece_key=piece_key,
    )


def _last_token_before(forest: Forest, turn: Ints, key: Ints, end: Ints) -> Ints:
    """Find the position, over all rows, of the last token on the path before each copy, (C,); -1 if not in the piece.

    Entries of copies without actions have no meaning.
    """
    bare = np.flatnonzero((forest.prefix_length[turn] == 0) & (forest.action_length[turn] > 0))
    if bare.size:
        at = int(turn[bare[0]])
        raise ValueError(
            f"tree {forest.names[forest.tree[at]]}: turn {forest.index[at]} starts with an action token that no token "
            "precedes, so nothing predicts it; give the tree a prompt of at least one token"
        )
    above = np.maximum(forest.parent[turn], 0)
    empty = forest.action_length + forest.observation_length == 0
    while (skip := empty[above] & (forest.parent[above] >= 0)).any():
        above = np.where(skip, forest.parent[above], above)
    wanted = key - forest.order[turn] + forest.order[above]
    found = np.minimum(np.searchsorted(key, wanted), len(end) - 1)
    return np.where(key[found] == wanted, end[found] - 1, -1)


def _token_fields(forest: Forest, cut: Cut, copies: _Copies, mine: slice) -> dict[str, Any]:
    """Write the fields over the T tokens of the row whose copies are `mine`."""
    turn, length = copies.turn[mine], copies.length[mine]
    with_observation = length > forest.action_length[turn]
    parts: list[Ints] = []
    for n, read in zip(turn.tolist(), with_observation.tolist(), strict=True):
        parts.append(forest.actions[n])
        if read:
            parts.append(forest.observations[n])
    return {
        "input_ids": torch.from_numpy(np.concatenate(parts)),
        "position_ids": torch.from_numpy(ranges(forest.prefix_length[turn], length)),
        "subtree_end": torch.from_numpy(np.repeat(copies.subtree_end[mine], length)),
    }


def _action_fields(
    forest: Forest, weights: ForestWeights, by_turn: dict[str, Floats], copies: _Copies, mine: slice, dtype: torch.dtype
) -> dict[str, Any]:
    """Write the fields over the A action tokens and the N turns of the row whose copies are `mine`."""
    acting = mine.start + np.flatnonzero(forest.action_length[copies.turn[mine]] > 0)
    turn = copies.turn[acting]
    length = forest.action_length[turn]
    turn_offsets = offsets(length)
    predictor = ranges(copies.start[acting] - 1, length)
    predictor[turn_offsets[:-1]] = copies.before[acting]
    source = ranges(forest.action_offsets[turn], length)
    own = np.repeat(~copies.repeated[acting], length)
    number = turn.tolist()
    by_token = {
        "old_logprob": _gather(forest.old_logprobs, number),
        "rollout_logprob": _gather(forest.rollout_logprobs, number),
        "ref_logprob": np.zeros(len(source)),
        "weight_pos": weights.pos[source] * own,
        "weight_neg": weights.neg[source] * own,
        "weight_all": weights.all[source] * own,
        "trajectory_count": weights.count[source] * own,
    }
    floats = by_token | {name: values[turn] for name, values in by_turn.items()}
    ints = {"turn_offsets": turn_offsets, "turn_tree": forest.tree[turn], "turn_index": forest.index[turn]}
    return {
        "predictor": torch.from_numpy(predictor),
        "targets": torch.from_numpy(_gather(forest.actions, number).astype(np.int64)),
        **{name: torch.from_numpy(values).to(dtype) for name, values in floats.items()},
        **{name: torch.from_numpy(values).int() for name, values in ints.items()},
    }


def _gather(arrays: list[NDArray], turns: list[int]) -> NDArray:
    """Join the arrays of the given turns; none give an empty array of floats."""
    return np.concatenate([arrays[n] for n in turns]) if turns else np.zeros(0)


def _write_paths(
    forest: Forest, cut: Cut, copies: _Copies, weights: ForestWeights, row_of_piece: Ints, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Write the path tables of every row: its trajectories in the order of their leaves."""
    leaf_piece = cut.piece_of_turn[forest.leaves]
    kept = np.flatnonzero(leaf_piece >= 0)
    row = row_of_piece[leaf_piece[kept]]
    by_row = np.lexsort((forest.order[forest.leaves[kept]], row))
    kept, row = kept[by_row], row[by_row]
    whole = np.diff(forest.path_offsets)[kept]
    entries, trajectory = ranges(forest.path_offsets[kept], whole), np.repeat(np.arange(len(kept)), whole)
    wanted = copies.piece_key[leaf_piece[kept]][trajectory] + forest.order[forest.path_turns[entries]]
    copy = np.minimum(np.searchsorted(copies.key, wanted), len(copies.key) - 1)
    inside = copies.key[copy] == wanted  # the others are of the rows above
    entries, copy = entries[inside], copy[inside]
    counts = np.bincount(trajectory[inside], minlength=len(kept))
    acting = offsets(forest.action_length[copies.turn] > 0)  # copies with action tokens, counted over all rows
    local_turn = acting[copy] - np.repeat(acting[copies.row_offsets[row]], counts)
    entry_offsets = offsets(counts)
    tables = []
    for low, high in itertools.pairwise(np.searchsorted(row, np.arange(len(copies.row_offsets))).tolist()):
        mine, span = kept[low:high], slice(entry_offsets[low], entry_offsets[high])
        leaf = forest.leaves[mine]
        length = forest.prefix_length[leaf] + forest.action_length[leaf] + forest.observation_length[leaf]
        floats = {
            "path_weight_pos": weights.path_pos[entries[span]],
            "path_weight_neg": weights.path_neg[entries[span]],
            "leaf_multiplicity": forest.multiplicity[mine],
        }
        ints = {
            "path_offsets": entry_offsets[low : high + 1] - entry_offsets[low],
            "path_turns": local_turn[span],
            "leaf_turn": forest.index[leaf],
            "leaf_tree": forest.tree[leaf],
        }
        table: dict[str, Any] = {name: torch.from_numpy(values).to(dtype) for name, values in floats.items()}
        table |= {name: torch.from_numpy(values).int() for name, values in ints.items()}
        tables.append(table | {"flat_tokens": int(length @ forest.multiplicity[mine])})
    return tables
