"""A trainer's flat batch of trajectories, checked and written out as arrays over all their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atpo_fast.tree.forest import Bools, Floats, Ints, offsets

Values = Sequence[Any] | NDArray | torch.Tensor


@dataclass(slots=True, kw_only=True)
class Trajectories:
    """A flat batch: lists with one entry per trajectory, or padded (B, T) tensors with `attention_mask`."""

    input_ids: Values  # prompt and response tokens
    loss_mask: Values  # 1 on action tokens, one entry per token
    advantages: Values  # one number per trajectory, turn (maximal run of the mask), action token or token
    old_logprobs: Values  # one entry per token (None or NaN where nobody sampled it) or per action token
    rollout_logprobs: Values | None = None  # log-probs of the engine, in the same form; the old ones if not given
    attention_mask: Values | None = None  # 1 on real tokens of padded tensors
    group_ids: Values | None = None  # trajectories with equal ids share a tree; all do if not given


@dataclass(slots=True, kw_only=True)
class FlatBatch:
    """A batch of B trajectories one after another, X tokens in all."""

    offsets: Ints  # (B+1,) CSR over X
    ids: Ints  # (X,)
    action: Bools  # (X,) loss mask
    advantage: Floats  # (X,) 0 on other tokens
    old_logprob: Floats  # (X,) 0 on other tokens
    rollout_logprob: Floats  # (X,) 0 on other tokens
    group: Ints  # (B,) numbers 0, 1, ... in the order of first appearance
    turn_start: Bools  # (X,) first token of a turn's action
    turn_tokens: Ints  # (X,) action tokens of the token's turn; 0 on other tokens

    @property
    def owner(self) -> Ints:
        """Index of the trajectory of each token, (X,)."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def count(self, flags: Bools) -> Floats:
        """Count the flagged tokens of each trajectory: (X,) to (B,)."""
        return np.diff(offsets(flags)[self.offsets]).astype(np.float64)


def flat_batch(given: Trajectories) -> FlatBatch:
    """Check the entries and join them.

    Raises ValueError, naming the trajectory, for entries that do not fit together.
    """
    size = len(given.input_ids)
    for name in ("loss_mask", "advantages", "old_logprobs", "rollout_logprobs", "attention_mask", "group_ids"):
        values = getattr(given, name)
        if values is not None and len(values) != size:
            raise ValueError(f"from_trajectories: {size} trajectories but {len(values)} entries of {name}")
    ids, masks, old, rollout, advantage = [], [], [], [], []
    for i in range(size):
        real = None if given.attention_mask is None else _array(given.attention_mask[i]) != 0
        tokens, mask = _real(given.input_ids[i], real).astype(np.int64), _real(given.loss_mask[i], real) != 0
        if mask.shape != tokens.shape:
            raise ValueError(
                f"from_trajectories: trajectory {i} has {len(tokens)} tokens but a loss mask of {len(mask)}"
            )
        if not len(tokens) or mask[0]:
            raise ValueError(f"from_trajectories: trajectory {i} needs a token before its first action token")
        ids.append(tokens)
        masks.append(mask)
        old.append(_on_tokens("old_logprobs", i, _real(given.old_logprobs[i], real), mask))
        engine = given.old_logprobs if given.rollout_logprobs is None else given.rollout_logprobs
        rollout.append(_on_tokens("rollout_logprobs", i, _real(engine[i], real), mask))
        advantage.append(_on_tokens("advantages", i, _real(given.advantages[i], real), mask))
    names = np.zeros(size) if given.group_ids is None else _array(given.group_ids)
    _, first, group = np.unique(names, return_index=True, return_inverse=True)
    return _with_turns(
        offsets(np.array([len(tokens) for tokens in ids], dtype=np.int64)),
        np.concatenate(ids),
        np.concatenate(masks),
        (np.concatenate(advantage), np.concatenate(old), np.concatenate(rollout)),
        np.argsort(np.argsort(first))[group],
    )


def _with_turns(
    bounds: Ints, ids: Ints, action: Bools, floats: tuple[Floats, Floats, Floats], group: Ints
) -> FlatBatch:
    turn_start = _turn_starts(action, bounds[:-1])
    turn_of_action = np.cumsum(turn_start[action]) - 1
    turn_tokens = np.zeros(len(ids), dtype=np.int64)
    turn_tokens[action] = np.bincount(turn_of_action)[turn_of_action] if turn_of_action.size else 0
    advantage, old, rollout = floats
    return FlatBatch(
        offsets=bounds,
        ids=ids,
        action=action,
        advantage=advantage,
        old_logprob=old,
        rollout_logprob=rollout,
        group=group,
        turn_start=turn_start,
        turn_tokens=turn_tokens,
    )


def _turn_starts(action: Bools, trajectory_starts: Ints) -> Bools:
    """Flag the first action token of each turn, (X,): the token before it is none; no trajectory starts with one."""
    starts = action.copy()
    starts[1:] &= ~action[:-1]
    starts[trajectory_starts] = False
    return starts


def _on_tokens(name: str, i: int, values: NDArray, mask: Bools) -> Floats:
    """Spread values per trajectory, turn, action token or token over one trajectory: (tokens,), 0 off the actions."""
    if values.dtype == object:
        values = values.astype(np.float64)  # None becomes NaN
    actions = int(mask.sum())
    turn_lengths = np.diff(np.append(np.flatnonzero(_turn_starts(mask, np.zeros(1, dtype=np.int64))[mask]), actions))
    if values.size == mask.size and values.ndim:
        on_actions = values[mask]
    elif values.size == actions and values.ndim:
        on_actions = values
    elif name == "advantages" and values.ndim == 0:
        on_actions = np.full(actions, values)
    elif name == "advantages" and values.size == len(turn_lengths):
        on_actions = np.repeat(values, turn_lengths)
    else:
        raise ValueError(
            f"from_trajectories: trajectory {i} has {mask.size} tokens, {actions} action tokens and "
            f"{len(turn_lengths)} turns, but {values.size} {name}"
        )
    if not np.isfinite(on_actions).all():
        at = int(np.flatnonzero(~np.isfinite(on_actions))[0])
        token = int(np.flatnonzero(mask)[at])
        raise ValueError(
            f"from_trajectories: {name} of trajectory {i} are not all finite on its action tokens: action token {at} "
            f"(token {token}) has {on_actions[at]}; None and NaN may stand only where loss_mask is 0"
        )
    full = np.zeros(mask.size)
    full[mask] = on_actions
    return full


def _real(values: Any, real: Bools | None) -> NDArray:
    """Remove the padding from values per token; other values stay unchanged."""
    array = _array(values)
    return array[real] if real is not None and array.shape == real.shape else array


def _array(values: Any) -> NDArray:
    return values.detach().cpu().double().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
