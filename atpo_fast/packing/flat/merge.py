"""Merge the common prefixes of flat trajectories into a forest.

Trajectories are sorted by their tokens, so that common prefixes lie next to each other. A trajectory then owns the
tokens after its common prefix with the one before it: those are the unique tokens (U).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atpo_fast.packing.flat.batch import FlatBatch
from atpo_fast.tree.forest import Bools, Forest, Ints, offsets, ranges


@dataclass(slots=True)
class Merged:
    """The forest of a flat batch and where the batch's tokens went."""

    forest: Forest
    trajectory: Ints  # (B,) index in the forest's trajectories; identical ones are one of higher multiplicity
    action_of_token: Ints  # (X,) index in the forest's action tokens; meaningless on other tokens
    opens_turn: Bools  # (X,) first action token of a turn of the forest


def merge_prefixes(batch: FlatBatch, *, whole_turns: bool, constant_turns: bool) -> Merged:
    """Merge common prefixes into one tree per group.

    Tokens merge when all before them do and their id, mask and, on action tokens, old and rollout log-probs are equal.
    With `whole_turns` action tokens merge only if their whole turns are equal. With `constant_turns` a turn of the
    forest is split where the advantage of a trajectory through it changes.
    """
    token = np.full(len(batch.ids), -1, dtype=np.int64)  # unique token of each token
    parts: list[tuple[Ints, Ints, Bools]] = []
    used = 0
    for group in range(int(batch.group.max(initial=-1)) + 1):
        parts.append(_merge_group(batch, np.flatnonzero(batch.group == group), used, whole_turns, token))
        used += len(parts[-1][0])
    source, before, opens = (np.concatenate(collected) for collected in zip(*parts, strict=True))
    starts_turn = opens | batch.turn_start[source]
    if constant_turns:
        changes = np.flatnonzero(batch.action[1:] & batch.action[:-1] & (np.diff(batch.advantage) != 0)) + 1
        starts_turn[token[changes]] = True
    return _as_forest(batch, token, source, before, starts_turn)


def _merge_group(
    batch: FlatBatch, members: Ints, used: int, whole_turns: bool, token: Ints
) -> tuple[Ints, Ints, Bools]:
    """Write the numbers of one group's unique tokens, from `used` on, to `token`.

    Returns (U,) representative in the batch, (U,) unique token before, (U,) whether a turn of the forest must start.
    """
    keys = _token_keys(batch, members)
    order = np.argsort(keys.reshape(len(members), -1).view(f"V{keys[0].nbytes}").ravel(), kind="stable")
    keys, members = keys[order], members[order]
    start, length = batch.offsets[members], np.diff(batch.offsets)[members]
    common = _common_prefixes(keys, length)
    if whole_turns:
        common = _down_to_turn_starts(batch, common, start, length)
    own_start = offsets(length - common) + used
    for i, (at, size, shared) in enumerate(zip(start.tolist(), length.tolist(), common.tolist(), strict=True)):
        token[at + shared : at + size] = np.arange(own_start[i], own_start[i + 1])
        if shared:
            token[at : at + shared] = token[start[i - 1] : start[i - 1] + shared]
    source = ranges(start + common, length - common)
    before = np.arange(len(source)) + used - 1
    opens = np.zeros(len(source), dtype=bool)
    owning = np.flatnonzero(length > common)
    first = own_start[:-1][owning] - used
    before[first] = np.where(common[owning] > 0, token[start[owning] + np.maximum(common[owning], 1) - 1], -1)
    opens[first] = True
    split = 1 + np.flatnonzero(common[1:] < length[:-1])  # the trajectory before continues where this one leaves it
    opens[token[start[split - 1] + common[split]] - used] = True
    return source, before, opens


def _token_keys(batch: FlatBatch, members: Ints) -> NDArray:
    """Make big-endian keys, (B, T, 3), that sort padding before observations before actions, each by its tokens."""
    length = np.diff(batch.offsets)[members]
    keys = np.zeros((len(members), int(length.max()), 3), dtype=">u8")
    at, place = ranges(batch.offsets[members], length), ranges(np.zeros(len(members), dtype=np.int64), length)
    row = np.repeat(np.arange(len(members)), length)
    keys[row, place, 0] = (
        (batch.action[at].astype(np.uint64) << np.uint64(62)) + batch.ids[at].astype(np.uint64) + np.uint64(1)
    )
    keys[row, place, 1] = (batch.old_logprob[at] + 0.0).view(np.uint64)  # + 0.0: one zero
    keys[row, place, 2] = (batch.rollout_logprob[at] + 0.0).view(np.uint64)
    return keys


def _common_prefixes(keys: NDArray, length: Ints) -> Ints:
    """Count the tokens that each trajectory shares with the one before it: (B,)."""
    common = np.zeros(len(keys), dtype=np.int64)
    for i in range(1, len(keys)):
        limit = int(min(length[i - 1], length[i]))
        differs = (keys[i, :limit] != keys[i - 1, :limit]).any(axis=1)
        common[i] = differs.argmax() if differs.any() else limit
    return common


def _down_to_turn_starts(batch: FlatBatch, common: Ints, start: Ints, length: Ints) -> Ints:
    """Shorten common prefixes that end inside a turn's action.

    Actions sort last: where either of two neighbours continues with an action token, the later one does.
    """
    last = start + np.maximum(common, 1) - 1
    following = np.minimum(start + common, len(batch.action) - 1)
    inside = (common > 0) & (common < length) & batch.action[last] & batch.action[following]
    turn_starts = np.flatnonzero(batch.turn_start)
    shortened = common.copy()
    shortened[inside] = turn_starts[np.searchsorted(turn_starts, last[inside], side="right") - 1] - start[inside]
    return shortened


def _as_forest(batch: FlatBatch, token: Ints, source: Ints, before: Ints, starts_turn: Bools) -> Merged:
    """Make the runs of unique tokens from one start to the next turns of a forest, under one empty root per group."""
    first = np.flatnonzero(starts_turn)
    length = np.diff(np.append(first, len(source)))
    groups = int(batch.group.max()) + 1
    group = batch.group[batch.owner[source[first]]]
    turn_of_token = np.repeat(np.arange(len(first)), length) + group.repeat(length) + 1  # after the roots so far
    parent = np.where(before[first] >= 0, turn_of_token[before[first]], -1)
    parent = np.where(parent < 0, group + np.searchsorted(group, group), parent)
    number = np.arange(len(first)) + group + 1
    tree = np.zeros(len(first) + groups, dtype=np.int64)
    all_parents = np.full(len(tree), -1, dtype=np.int64)
    tree[number], all_parents[number] = group, parent
    roots = np.setdiff1d(np.arange(len(tree)), number)
    tree[roots] = np.arange(groups)
    bounds, actions = np.zeros(len(tree), dtype=np.int64), np.zeros(len(tree), dtype=np.int64)
    bounds[number] = length
    bounds = offsets(bounds)
    action = batch.action[source]
    actions = np.diff(offsets(action)[bounds])
    spans = list(zip(bounds[:-1].tolist(), (bounds[:-1] + actions).tolist(), bounds[1:].tolist(), strict=True))
    ids, old, rollout = batch.ids[source], batch.old_logprob[source], batch.rollout_logprob[source]
    end_turn = turn_of_token[token[batch.offsets[1:] - 1]]
    leaves, trajectory, multiplicity = np.unique(end_turn, return_inverse=True, return_counts=True)
    forest = Forest(
        names=[f"{g} (of trajectories)" for g in range(groups)],
        tree=tree,
        index=np.arange(len(tree)) - roots[tree],
        parent=all_parents,
        actions=[ids[low:middle] for low, middle, _ in spans],
        observations=[ids[middle:high] for _, middle, high in spans],
        old_logprobs=[old[low:middle] for low, middle, _ in spans],
        rollout_logprobs=[rollout[low:middle] for low, middle, _ in spans],
        leaves=leaves,
        multiplicity=multiplicity.astype(np.float64),
    )
    return Merged(forest, trajectory, (np.cumsum(action) - 1)[token], (starts_turn & action)[token])
