"""The line of tokens that the PyTorch implementations of the policy loss work on, and how arguments become one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atpo_kernels.arguments import Averaging, LossArguments, TurnClip
from atpo_kernels.choices import Reduction
from atpo_kernels.records import LeafPaths, LossConfig, TokenWeights


@dataclass(slots=True, kw_only=True)
class LossTokens:
    """Action tokens in a line. Floats are detached, of one dtype (float32 or float64), and 0 where not valid."""

    logprob: Tensor  # (A,)
    old_logprob: Tensor  # (A,)
    weights: TokenWeights  # (A,) each
    turn: Tensor  # (A,) int64 turn of the token
    num_turns: int  # an upper bound of `turn` + 1
    group: Tensor | None  # (A,) int64: tokens that share a ratio; None: each token has its own, or `paths` tells
    num_groups: int  # an upper bound of `group` + 1
    valid: Tensor | None  # (A,) bool; None: all are
    paths: LeafPaths | None  # level `sequence` on packed turns
    ref_logprob: Tensor | None  # (A,)
    rollout_logprob: Tensor | None  # (A,)
    entropy: Tensor | None  # (A,)
    bounds: tuple[Tensor, Tensor] | None = None  # (A,) lower and upper bound of the ratio; None: the configuration's


def loss_tokens(arguments: LossArguments) -> LossTokens:
    """Bring checked arguments of either layout into a line of tokens."""
    inputs, advantages, weights = arguments.inputs, arguments.advantages, arguments.weights
    turn_offsets, mask, turn_ids, paths = arguments.structure
    dtype = torch.float64 if inputs.logprob.dtype == torch.float64 else torch.float32
    valid = None if mask is None else mask.detach().bool()
    named = inputs.named(dtype)
    if inputs.old_logprob is None:
        named["old_logprob"] = named["logprob"]
    if turn_offsets is not None:
        if weights is None:
            assert advantages is not None
            weights = _packed_weights(advantages, turn_offsets, valid, inputs.logprob.to(dtype), arguments.averaging)
        return packed_tokens(named, weights, turn_offsets, paths, valid, arguments.config, arguments.turn_clip)
    shape = arguments.padded_shape
    valid = torch.ones(shape, dtype=torch.bool, device=inputs.logprob.device) if valid is None else valid.view(shape)
    turn = turns_from_mask(valid) if turn_ids is None else turns_from_ids(turn_ids.reshape(shape), valid)
    if weights is None:
        assert advantages is not None
        advantages = advantages.detach().to(dtype)
        advantages = advantages.reshape(shape) if advantages.shape == inputs.logprob.shape else advantages.view(-1, 1)
        share = padded_shares(valid, turn, *arguments.averaging, dtype)
        weights = token_weights_from_advantages(torch.where(valid, advantages, 0), share)
    return padded_tokens(named, weights, turn, valid, arguments.config)


def packed_tokens(
    inputs: dict[str, Tensor | None],  # logprob, old_logprob, ref_logprob, rollout_logprob, entropy: (A,) or None
    weights: TokenWeights,  # (A,) each
    turn_offsets: Tensor,  # (N+1,)
    paths: LeafPaths | None,
    valid: Tensor | None,  # (A,) bool
    config: LossConfig,
    turn_clip: TurnClip,  # (N,) each
) -> LossTokens:
    """Bring packed turns into a line. Level `sequence` needs `paths`."""
    logprob = _present(inputs["logprob"])
    turn = turn_of_token(turn_offsets, logprob.numel())
    num_turns = turn_offsets.numel() - 1
    by_path = config.level == "sequence"
    if by_path and paths is None:
        raise ValueError("turn_policy_loss: level='sequence' on packed turns needs paths (which turns each leaf has)")
    return LossTokens(
        **_clean(inputs, valid),  # type: ignore[arg-type]
        weights=_clean_weights(weights, valid, logprob.dtype),
        turn=turn,
        num_turns=num_turns,
        group=turn if config.level == "turn" else None,
        num_groups=num_turns,
        valid=valid,
        paths=paths if by_path else None,
        bounds=_ratio_bounds(turn_clip, turn, logprob.dtype, config),
    )


def padded_tokens(
    inputs: dict[str, Tensor | None],  # as above, (B, T)
    weights: TokenWeights,  # (B, T) each
    turn: Tensor,  # (B, T) int64
    valid: Tensor,  # (B, T) bool
    config: LossConfig,
) -> LossTokens:
    """Bring a padded batch into a line, row by row; a row is a sequence."""
    batch, length = valid.shape
    flat = {name: None if x is None else x.reshape(-1) for name, x in inputs.items()}
    turn, valid = turn.reshape(-1), valid.reshape(-1)
    row = torch.arange(batch, device=valid.device).repeat_interleave(length, output_size=batch * length)
    group, num_groups = {
        "token": (None, 0),
        "turn": (turn, valid.numel()),
        "sequence": (row, batch),
    }[config.level]
    flat_weights = TokenWeights(weights.pos.reshape(-1), weights.neg.reshape(-1), weights.all.reshape(-1))
    return LossTokens(
        **_clean(flat, valid),  # type: ignore[arg-type]
        weights=_clean_weights(flat_weights, valid, _present(inputs["logprob"]).dtype),
        turn=turn,
        num_turns=valid.numel(),
        group=group,
        num_groups=num_groups,
        valid=valid,
        paths=None,
    )


def _ratio_bounds(
    turn_clip: TurnClip,  # (N,) each
    turn: Tensor,  # (A,)
    dtype: torch.dtype,
    config: LossConfig,
) -> tuple[Tensor, Tensor] | None:  # (A,) each
    """Give every token the bounds of its turn's ratio; None where they are the configuration's."""
    low, high = turn_clip
    if low is None and high is None:
        return None
    ones = torch.ones(turn.shape, dtype=dtype, device=turn.device)
    below = config.clip_low if low is None else low.detach().to(dtype)[turn]
    above = config.clip_high if high is None else high.detach().to(dtype)[turn]
    return ones - below, ones + above


def _packed_weights(
    advantages: Tensor,  # (N,) or (A,)
    turn_offsets: Tensor,  # (N+1,)
    valid: Tensor | None,  # (A,)
    like: Tensor,  # (A,)
    averaging: Averaging,
) -> TokenWeights:  # (A,) each
    """Aggregate advantages of packed turns or of their tokens into token weights."""
    advantages = advantages.detach().to(like.dtype)
    if advantages.shape != like.shape:
        sizes = turn_offsets.diff().long()
        advantages = advantages.repeat_interleave(sizes, output_size=like.numel())
    if valid is not None:
        advantages = torch.where(valid, advantages, 0)
    return token_weights_from_advantages(
        advantages, packed_shares(valid, turn_offsets, like, averaging.reduction, averaging.denominator)
    )


def turn_of_token(turn_offsets: Tensor, tokens: int) -> Tensor:  # (N+1,) -> (A,) int64
    """Find the turn that holds each token, without waiting for the device."""
    index = torch.arange(tokens, device=turn_offsets.device, dtype=turn_offsets.dtype)
    return torch.bucketize(index, turn_offsets[1:].contiguous(), right=True)


def turns_from_mask(valid: Tensor) -> Tensor:  # (B, T) bool -> (B, T) int64
    """Return the turn of each token: maximal runs of ones, numbered over the batch. Other tokens have any number."""
    before = torch.nn.functional.pad(valid[:, :-1], (1, 0))
    starts = (valid & ~before).reshape(-1)
    return (starts.cumsum(0) - 1).clamp_min_(0).view(valid.shape)


def turns_from_ids(turn_ids: Tensor, valid: Tensor) -> Tensor:  # (B, T), (B, T) bool -> (B, T) int64
    """Return the turn of each token over the batch: tokens of a row with one id, in [0, T) where the mask is 1."""
    batch, length = valid.shape
    ids = torch.where(valid, turn_ids.long(), 0)
    if ids.device.type == "cpu" and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= length):
        raise ValueError(f"turn_policy_loss: turn_ids must lie in [0, {length}) where the mask is 1")
    return ids + torch.arange(batch, device=ids.device)[:, None] * length


def token_weights_from_advantages(advantages: Tensor, share: Tensor) -> TokenWeights:  # one shape
    """Weigh tokens that each belong to one trajectory, given their aggregation weight w as `share`."""
    return TokenWeights(share * advantages.clamp_min(0), share * (-advantages).clamp_min(0), share)


def padded_shares(
    valid: Tensor,  # (B, T) bool
    turn: Tensor,  # (B, T) int64
    reduction: Reduction,
    max_length: int | None,
    denominator: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # (B, T)
    """Compute the aggregation weight w of every token of a padded batch; 0 outside the mask.

    See docs/design.md#objective.
    """
    batch, length = valid.shape
    share = valid.to(dtype)
    rows = max(batch, 1) if denominator is None else denominator
    if reduction in ("sum", "none"):
        return share
    if reduction == "token-mean":
        return share / (share.sum().clamp_min(1) if denominator is None else denominator)
    if reduction == "seq-mean-token-mean":
        return share / (share.sum(1, keepdim=True).clamp_min(1) * rows)
    if reduction == "seq-mean-token-sum":
        return share / rows
    if reduction == "seq-mean-token-sum-norm":
        return share / (rows * (max_length or max(length, 1)))
    share = share / turn_sizes(share, turn, valid.numel())
    return share / (share.sum(1, keepdim=True).clamp_min(1) * rows)


def packed_shares(
    valid: Tensor | None,  # (A,) bool
    turn_offsets: Tensor,  # (N+1,)
    like: Tensor,  # (A,)
    reduction: Reduction,
    denominator: float | Tensor | None,
) -> Tensor:  # (A,)
    """Compute the aggregation weight w of every token of packed turns, which count as one sequence."""
    share = torch.ones_like(like) if valid is None else valid.to(like.dtype)
    if reduction in ("sum", "none"):
        return share
    if reduction == "token-mean":
        return share / (share.sum().clamp_min(1) if denominator is None else denominator)
    assert reduction == "turn-mean"  # turn_offsets do not tell which turns form a sequence
    share = share / turn_sizes(share, turn_of_token(turn_offsets, share.numel()), turn_offsets.numel() - 1)
    return share / (share.sum().clamp_min(1) * (1 if denominator is None else denominator))


def turn_sizes(share: Tensor, turn: Tensor, num_turns: int) -> Tensor:  # one shape
    """Count, for every token, the tokens of share 1 in its turn; at least 1."""
    sizes = share.new_zeros(num_turns).index_add_(0, turn.reshape(-1), share.reshape(-1))
    return sizes.clamp_min_(1)[turn]


def _present(tensor: Tensor | None) -> Tensor:
    """Tell the type checker that a tensor is there."""
    assert tensor is not None
    return tensor


def _clean(inputs: dict[str, Tensor | None], valid: Tensor | None) -> dict[str, Tensor | None]:
    """Put zeros where tokens are not valid, so that whatever lies in padding reaches neither loss nor gradient."""
    if valid is None:
        return inputs
    return {name: None if x is None else torch.where(valid, x, 0) for name, x in inputs.items()}


def _clean_weights(weights: TokenWeights, valid: Tensor | None, dtype: torch.dtype) -> TokenWeights:
    """Detach and cast weights, with zeros where tokens are not valid."""
    parts = [w.detach().to(dtype) for w in (weights.pos, weights.neg, weights.all)]
    return TokenWeights(*(parts if valid is None else [torch.where(valid, w, 0) for w in parts]))
