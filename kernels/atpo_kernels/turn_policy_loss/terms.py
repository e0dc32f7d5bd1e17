"""The maths of the policy loss: value and exact derivative of every token, computed in closed form (design, section 4).

The derivative is the straight-through one: with u the log-ratio averaged over a token, a turn or a sequence,
rho = exp(min(u, max_log_ratio)) has d rho / d logprob = rho for each of its tokens, also above the cap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atpo_kernels.records import KLMode, LeafPaths, LossConfig
from atpo_kernels.turn_policy_loss.tokens import LossTokens


@dataclass(slots=True)
class TokenTerms:
    """The loss of every token."""

    value: Tensor  # (A,) the loss is its sum
    coef: Tensor  # (A,) d loss / d logprob, without the way through the entropy
    entropy_slope: Tensor | None  # (A,) d loss / d entropy; None: 0
    ratio: Tensor  # (A,) rho; at level `sequence` on packed rows its mean over the trajectories through the token
    cut_low: Tensor  # (A,) in [0, 1]: whether (in which share of the trajectories) the lower bound replaces rho
    cut_high: Tensor  # (A,) likewise the upper bound
    kl: Tensor | None  # (A,) KL to the reference


@dataclass(slots=True)
class Surrogate:
    """g(rho) for both signs of the advantage, and its derivative by logprob; all of the shape of rho.

    The loss is -W+ * gain_pos + W- * gain_neg. With clip "cispo" the gains are still to be multiplied by logprob.
    """

    gain_pos: Tensor
    slope_pos: Tensor
    gain_neg: Tensor
    slope_neg: Tensor


@dataclass(slots=True)
class PolicyTerm:
    """The policy term by token (or by turn, before it is spread over the turn's tokens)."""

    gain: Tensor
    slope: Tensor
    ratio: Tensor
    cut_low: Tensor
    cut_high: Tensor


def token_terms(tokens: LossTokens, config: LossConfig) -> TokenTerms:
    """Loss, derivatives and clip marks of every token."""
    delta = tokens.logprob - tokens.old_logprob
    policy = _path_term(tokens, delta, tokens.paths, config) if tokens.paths else _group_term(tokens, delta, config)
    trust = _importance(tokens, config)
    gain, slope = (policy.gain, policy.slope) if trust is None else (policy.gain * trust, policy.slope * trust)
    value = gain * tokens.logprob if config.clip == "cispo" else gain
    kl = None
    if config.needs_reference:
        assert tokens.ref_logprob is not None
        kl, kl_slope = kl_terms(tokens.logprob, tokens.ref_logprob, config.kl)
        value = value + config.kl_coef * tokens.weights.all * kl
        slope = slope + config.kl_coef * tokens.weights.all * kl_slope
    entropy_slope = None
    if config.needs_entropy:
        assert tokens.entropy is not None
        entropy_slope = -config.entropy_coef * tokens.weights.all
        value = value + entropy_slope * tokens.entropy
    return TokenTerms(value, slope, entropy_slope, policy.ratio, policy.cut_low, policy.cut_high, kl)


def surrogate(ratio: Tensor, config: LossConfig) -> Surrogate:
    """g+ and g- of the clip family."""
    low, high = 1 - config.clip_low, 1 + config.clip_high
    if config.clip == "sapo":
        return Surrogate(*_gate(ratio, config.sapo_tau_pos), *_gate(ratio, config.sapo_tau_neg))
    if config.clip == "cispo":
        clipped = ratio.clamp(low, high)
        return Surrogate(clipped, clipped, clipped, clipped)
    gain_pos, gain_neg = ratio.clamp_max(high), ratio.clamp_min(low)
    slope_pos = gain_pos if config.clip in ("soft", "soft_high") else ratio.masked_fill(ratio > high, 0)
    slope_neg = gain_neg if config.clip == "soft" else ratio.masked_fill(ratio < low, 0)
    if config.clip == "dual":
        slope_neg = slope_neg.masked_fill(ratio > config.dual_cap, 0)
        gain_neg = gain_neg.clamp_max(config.dual_cap)
    return Surrogate(gain_pos, slope_pos, gain_neg, slope_neg)


def kl_terms(logprob: Tensor, ref_logprob: Tensor, mode: KLMode) -> tuple[Tensor, Tensor]:
    """KL estimate of every token and its derivative by logprob; low_var is k3 with its argument and value clamped."""
    gap = logprob - ref_logprob
    if mode == "k1":
        return gap, torch.ones_like(gap)
    if mode == "k2":
        return gap.square() / 2, gap
    if mode == "k3":
        return _k3(gap), 1 - (-gap).exp()
    bounded = gap.clamp(-20, 20)
    kl = _k3(bounded)
    free = (bounded == gap) & (kl.abs() <= 10)
    return kl.clamp(-10, 10), torch.where(free, 1 - (-bounded).exp(), 0)


def mean_by_group(values: Tensor, tokens: LossTokens, group: Tensor, num_groups: int) -> Tensor:
    """(A,) of every token the mean of `values` over the valid tokens of its group."""
    ones = torch.ones_like(values) if tokens.valid is None else tokens.valid.to(values.dtype)
    sums = values.new_zeros(num_groups).index_add_(0, group, values)
    counts = values.new_zeros(num_groups).index_add_(0, group, ones)
    return (sums / counts.clamp_min_(1))[group]


def approximate_kl(delta: Tensor, config: LossConfig) -> Tensor:
    """k3 estimate of KL(old || new) by token, from delta = logprob - old_logprob, capped as the ratio is."""
    return _k3(-delta.clamp_max(config.max_log_ratio))


def _k3(gap: Tensor) -> Tensor:
    return torch.expm1(-gap) + gap


def _gate(ratio: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """4/tau * sigmoid(tau (rho - 1)) and its derivative by logprob."""
    open_share = torch.sigmoid(tau * (ratio - 1))
    return open_share * (4 / tau), 4 * open_share * (1 - open_share) * ratio


def _group_term(tokens: LossTokens, delta: Tensor, config: LossConfig) -> PolicyTerm:
    """Ratio levels token and turn, and sequence where a token belongs to one sequence."""
    mean = delta if tokens.group is None else mean_by_group(delta, tokens, tokens.group, tokens.num_groups)
    return _weighted(_ratio(mean, config), tokens.weights.pos, tokens.weights.neg, config)


def _path_term(tokens: LossTokens, delta: Tensor, paths: LeafPaths, config: LossConfig) -> PolicyTerm:
    """Ratio level sequence on packed turns: one ratio per trajectory, summed over the trajectories through a turn."""
    turns = paths.turns.long()
    leaf = torch.bucketize(
        torch.arange(turns.numel(), device=turns.device, dtype=paths.offsets.dtype),
        paths.offsets[1:].contiguous(),
        right=True,
    )
    leaves = paths.offsets.numel() - 1
    by_turn = delta.new_zeros(2, tokens.num_turns).index_add_(1, tokens.turn, torch.stack([delta, _ones(tokens)]))
    by_leaf = delta.new_zeros(2, leaves).index_add_(1, leaf, by_turn[:, turns])
    ratio = _ratio(by_leaf[0] / by_leaf[1].clamp_min(1), config)[leaf]
    weight_pos, weight_neg = (w.detach().to(delta.dtype) for w in (paths.weight_pos, paths.weight_neg))
    term = _weighted(ratio, weight_pos, weight_neg, config)
    parts = torch.stack([term.gain, term.slope, term.ratio, term.cut_low, term.cut_high, torch.ones_like(ratio)])
    sums = delta.new_zeros(6, tokens.num_turns).index_add_(1, turns, parts)
    sums[2:5] /= sums[5].clamp_min(1)
    on_tokens = sums[:5, tokens.turn]
    if tokens.valid is not None:
        on_tokens = on_tokens * tokens.valid
    return PolicyTerm(*on_tokens.unbind())


def _weighted(ratio: Tensor, weight_pos: Tensor, weight_neg: Tensor, config: LossConfig) -> PolicyTerm:
    """Both signs of the advantage together."""
    g = surrogate(ratio, config)
    gain = weight_neg * g.gain_neg - weight_pos * g.gain_pos
    slope = weight_neg * g.slope_neg - weight_pos * g.slope_pos
    low, high = _cuts(ratio, weight_pos > 0, weight_neg > 0, config)
    return PolicyTerm(gain, slope, ratio, low.to(ratio.dtype), high.to(ratio.dtype))


def _cuts(ratio: Tensor, positive: Tensor, negative: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Where the lower and the upper bound replace rho in a term of weight > 0. A sapo gate has no bounds."""
    if config.clip == "sapo":
        none = torch.zeros_like(positive)
        return none, none
    below, above = ratio < 1 - config.clip_low, ratio > 1 + config.clip_high
    if config.clip == "cispo":
        return below & (positive | negative), above & (positive | negative)
    high = above & positive
    if config.clip == "dual":
        high = high | (negative & (ratio > config.dual_cap))
    return below & negative, high


def _ratio(log_ratio: Tensor, config: LossConfig) -> Tensor:
    return log_ratio.clamp_max(config.max_log_ratio).exp()


def _importance(tokens: LossTokens, config: LossConfig) -> Tensor | None:
    """(A,) truncated importance weight of the sampling engine against the trainer."""
    if config.importance_cap is None:
        return None
    assert tokens.rollout_logprob is not None
    return (tokens.old_logprob - tokens.rollout_logprob).exp().clamp_max(config.importance_cap)


def _ones(tokens: LossTokens) -> Tensor:
    """(A,) 1 on valid tokens."""
    return torch.ones_like(tokens.logprob) if tokens.valid is None else tokens.valid.to(tokens.logprob.dtype)
