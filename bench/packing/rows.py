"""Packed rows of a forest: as trees, written out, with the head on every position, padded, with clipped turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from atpo_fast import Objective, TurnTree, pack_trees
from atpo_fast.packing import PackedTrees
from atpo_kernels.tree_attention.reference import key_positions
from bench.packing.forests import written_out

OBJECTIVE = Objective.preset("at2po")
_PIECE = 64  # tokens of an artificial turn of positions without loss
_FAR = 0.05  # mean log-ratio of a clipped turn, more than ten times the clip range
_NO_WEIGHT = 1e-30  # of positions without loss: not 0, or the head would leave their gradients out


@dataclass(frozen=True, slots=True)
class Padded:
    """Sequences of a flat row side by side, right-padded to the longest."""

    input_ids: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) int64: 1 on tokens
    predictor: Tensor  # (A,) int64 into the B * L positions


def tree_rows(forest: Sequence[TurnTree], max_tokens: int, max_prefix: int = 0) -> list[PackedTrees]:
    """Pack trees without pruning; sampled log-probs are the current ones, as in a batch's first update."""
    rows = pack_trees(forest, OBJECTIVE, max_tokens, prune=False, max_prefix=max_prefix)
    return [replace(row, old_logprob=None) for row in rows]


def flat_rows(forest: list[TurnTree], max_tokens: int) -> list[PackedTrees]:
    """Pack the same trajectories written out, side by side without padding."""
    return tree_rows(written_out(forest), max_tokens)


def sequence_ends(subtree_end: Tensor) -> list[int]:  # (T,) of a flat row
    """List the index after the last token of each sequence."""
    return subtree_end.unique().tolist()


def visible_pairs(subtree_end: Tensor, window: int | None = None) -> int:  # (T,)
    """Count the pairs of a query and a key that it sees: those on its path, and with a window the last of them."""
    path = key_positions(subtree_end, 0) + 1  # (T,) tokens of the path of each, itself included
    return int((path if window is None else path.clamp(max=window)).sum())


def every_position(row: PackedTrees) -> PackedTrees:
    """Make a flat row whose head runs on all positions that have a next token, as in a trainer that masks the loss.

    The same loss: positions without action weigh next to nothing, in artificial turns of at most 64 tokens.
    """
    length = row.num_tokens
    scored = np.ones(length, bool)
    scored[np.asarray(sequence_ends(row.subtree_end)) - 1] = False  # the last tokens predict nothing
    position = np.flatnonzero(scored)
    place = np.cumsum(scored) - 1  # of a position among those
    own = place[row.predictor.numpy()]  # (A,)
    offsets = row.turn_offsets.numpy()
    inside = np.zeros(len(position), bool)
    inside[own] = True
    inside[own[offsets[:-1]]] = False  # a turn may start here
    starts = np.zeros(len(position), bool)
    starts[own[offsets[:-1]]] = True
    starts[np.arange(0, len(position), _PIECE)] = True
    after = own[offsets[1:] - 1] + 1
    starts[after[after < len(position)]] = True
    bounds = np.append(np.flatnonzero(starts & ~inside), len(position))
    index = torch.from_numpy(own)

    def spread(values: Tensor, elsewhere: float) -> Tensor:  # (A,) -> (P,)
        return torch.full((len(position),), elsewhere, dtype=values.dtype).index_copy_(0, index, values)

    predictor = torch.from_numpy(position)
    return replace(
        row,
        predictor=predictor,
        targets=row.input_ids[predictor + 1],
        old_logprob=None,
        rollout_logprob=spread(row.rollout_logprob, 0),
        ref_logprob=spread(row.ref_logprob, 0),
        weight_pos=spread(row.weight_pos, _NO_WEIGHT),
        weight_neg=spread(row.weight_neg, 0),
        weight_all=spread(row.weight_all, 0),
        trajectory_count=spread(row.trajectory_count, 0),
        turn_offsets=torch.from_numpy(bounds.astype(np.int32)),
    )


def pad(row: PackedTrees) -> Padded:
    """Make a padded batch of a flat row."""
    ends = np.asarray(sequence_ends(row.subtree_end))
    starts = np.append(0, ends[:-1])
    lengths = ends - starts
    longest = int(lengths.max())
    of_token = np.repeat(np.arange(len(ends)), lengths)
    cell = torch.from_numpy(of_token * longest + np.arange(row.num_tokens) - starts[of_token])  # (T,)
    shape = (len(ends), longest)
    ids = torch.zeros(shape, dtype=torch.int64).view(-1).index_copy_(0, cell, row.input_ids).view(shape)
    mask = torch.zeros(shape, dtype=torch.int64).view(-1).index_fill_(0, cell, 1).view(shape)
    return Padded(ids, mask, cell[row.predictor])


def with_clipped_turns(row: PackedTrees, logprob: Tensor, share: float, seed: int = 0) -> PackedTrees:  # logprob (A,)
    """Give a row old log-probs by which a random `share` of the turns is clipped.

    The mean log-ratio of those lies far outside the clip range, on the side that clips; that of the others is 0.
    """
    turns = row.num_turns
    clipped = torch.randperm(turns, generator=torch.Generator().manual_seed(seed)) < round(share * turns)
    clipped = clipped.repeat_interleave(row.turn_offsets.diff().long()).to(logprob.device)
    sign = (row.weight_pos - row.weight_neg).sign().to(logprob.device)
    return replace(row, old_logprob=logprob - _FAR * sign * clipped)
