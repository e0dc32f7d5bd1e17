"""From any trainer's flat batch to packed rows: trees are not required."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from atpo_fast.objective import Objective
from atpo_fast.packing.flat.batch import FlatBatch, Trajectories, flat_batch
from atpo_fast.packing.flat.merge import Merged, merge_prefixes
from atpo_fast.packing.pack import pack_forest
from atpo_fast.packing.weights import ForestWeights, Weigh, trajectory_scale
from atpo_fast.tree.forest import Floats, Ints, group_sum, ranges
from atpo_fast.tree.packed_rows import PackedTrees


def from_trajectories(
    trajectories: Trajectories | Mapping[str, Any],
    objective: Objective,
    max_tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
    prune: bool = True,
) -> list[PackedTrees]:
    """Pack a flat batch with its common prefixes merged; the loss is that of the flat batch.

    See docs/design.md#flat-batches.

    Give the whole mini-batch, of all ranks. Tokens merge where that keeps the loss exact: prompts and observations
    token by token; actions token by token too, but as whole turns at the ratio level `turn`; and only where the old
    (and rollout) log-probs are equal. At the levels token and sequence a turn may be split in several packed turns.
    `turn_tree` and `leaf_tree` are groups, in the order of their first trajectory.

    Args:
        trajectories: see `Trajectories`, or a mapping with its fields.
        objective, max_tokens, dtype, prune: as in `pack_trees`.

    Raises:
        ValueError: entries that do not fit together, not finite, or without a token before the first action token;
            a trajectory longer than `max_tokens`.
    """
    given = Trajectories(**trajectories) if isinstance(trajectories, Mapping) else trajectories
    if not len(given.input_ids):
        return []
    batch = flat_batch(given)
    level = objective.loss_config.level
    merged = merge_prefixes(batch, whole_turns=level == "turn", constant_turns=level == "sequence")
    weigh = _trajectory_weights(batch, merged, objective)
    return pack_forest(merged.forest, weigh, objective, max_tokens, dtype=dtype, prune=prune)


def _trajectory_weights(batch: FlatBatch, merged: Merged, objective: Objective) -> Weigh:
    """Sum weights over the trajectories of the batch through each unique action token."""
    tokens, turns = batch.count(batch.action), batch.count(batch.turn_start)
    at = np.flatnonzero(batch.action)
    owner, advantage = batch.owner[at], batch.advantage[at]
    share = 1.0 / batch.turn_tokens[at] if objective.aggregation == "turn-mean" else np.ones(len(at))
    unique, size = merged.action_of_token[at], int(merged.forest.action_offsets[-1])
    opens = merged.opens_turn[at]
    entry = _path_entries(merged, owner[opens])

    def weigh(row: Ints | None) -> ForestWeights:
        of_trajectory = None if row is None else row[merged.trajectory]
        scale = trajectory_scale(objective, tokens, turns, np.ones(len(tokens)), of_trajectory)
        weight = scale[owner] * share
        pos, neg = weight * np.maximum(advantage, 0.0), weight * np.maximum(-advantage, 0.0)

        def total(values: Floats) -> Floats:
            return group_sum(unique, values, size)

        def path_total(values: Floats) -> Floats:
            return group_sum(entry, values[opens], len(merged.forest.path_turns))

        return ForestWeights(
            total(pos), total(neg), total(weight), total(np.ones(len(at))), path_total(pos), path_total(neg)
        )

    return weigh


def _path_entries(merged: Merged, owner: Ints) -> Ints:
    """Find the entry of the path table for each first action token of a forest turn, in the order of the tokens."""
    counts = np.bincount(owner, minlength=len(merged.trajectory))
    return ranges(merged.forest.path_offsets[merged.trajectory], counts)
