"""`turn_policy_loss` in vectorised PyTorch: value and exact derivative of every token in closed form, no host sync.

The derivative is the straight-through one: with u the log-ratio averaged over a token, a turn or a sequence,
rho = exp(min(u, max_log_ratio)) has d rho / d logprob = rho for each of its tokens, and 0 over the cap
(docs/design.md#ratio-levels).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atpo_kernels.arguments import LossArguments
from atpo_kernels.choices import KLEstimator
from atpo_kernels.records import LeafPaths, LossConfig
from atpo_kernels.tokens import LossTokens, loss_tokens

Bounds = tuple[Tensor | float, Tensor | float]
"""Lower and upper bound of the ratio: numbers, or (A,) each."""


@dataclass(slots=True)
class Evaluation:
    """Loss of a line of tokens, and its exact derivatives, detached."""

    loss: Tensor  # () or, by token, (A,)
    grad_logprob: Tensor  # (A,) d loss / d logprob
    grad_entropy: Tensor | None  # (A,) d loss / d entropy
    metrics: dict[str, Tensor]


@dataclass(slots=True)
class TokenTerms:
    """Loss of every token, and its derivatives."""

    value: Tensor  # (A,) the loss is its sum
    grad_logprob: Tensor  # (A,) d loss / d logprob, without the way through the entropy
    grad_entropy: Tensor | None  # (A,) d loss / d entropy; None: 0
    ratio: Tensor  # (A,) rho; at level `sequence` on packed rows its mean over the trajectories through the token
    clipped_low: Tensor  # (A,) in [0, 1]: whether (in which share of the trajectories) the lower bound replaces rho
    clipped_high: Tensor  # (A,) in [0, 1]: whether (in which share) the upper bound replaces rho
    kl: Tensor | None  # (A,) KL to the reference


@dataclass(slots=True)
class Surrogate:
    """Clip family g(rho) for both signs of the advantage, and its derivative by logprob; all of the shape of rho.

    The loss is -W+ * gain_pos + W- * gain_neg. With clip "cispo" the derivatives times logprob are still to be added to
    the gains.
    """

    gain_pos: Tensor
    grad_pos: Tensor
    gain_neg: Tensor
    grad_neg: Tensor


@dataclass(slots=True)
class PolicyTerm:
    """Policy term by token, or by turn before every token of the turn gets it."""

    gain: Tensor
    grad: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


@torch.no_grad()
def turn_policy_loss_torch(arguments: LossArguments) -> Evaluation:
    """Compute `turn_policy_loss` in PyTorch; see there."""
    return evaluate(loss_tokens(arguments), arguments.config, arguments.by_token)


def evaluate(tokens: LossTokens, config: LossConfig, by_token: bool) -> Evaluation:
    """Evaluate a line of tokens: loss (its sum, or by token), derivatives and metrics."""
    terms = token_terms(tokens, config)
    loss = terms.value if by_token else terms.value.sum()
    return Evaluation(loss, terms.grad_logprob, terms.grad_entropy, loss_metrics(tokens, terms, config))


def loss_metrics(tokens: LossTokens, terms: TokenTerms, config: LossConfig) -> dict[str, Tensor]:
    """Average over the tokens with W0 > 0, whose number is `tokens`; 0-dim tensors. See `turn_policy_loss`."""
    counted = tokens.weights.all > 0
    ones = counted.to(terms.value.dtype)
    total = ones.sum()

    def mean(values: Tensor) -> Tensor:
        return torch.where(counted, values, 0).sum() / total.clamp_min(1)

    in_turn = ones.new_zeros(tokens.num_turns).index_add_(0, tokens.turn, ones)
    ratio = torch.where(counted, terms.ratio, 0)
    metrics = {
        "clipped_low": mean(terms.clipped_low),
        "clipped_high": mean(terms.clipped_high),
        "approx_kl": mean(approximate_kl(tokens.logprob - tokens.old_logprob, config)),
        "ratio_mean": mean(terms.ratio),
        "ratio_max": ratio.amax() if ratio.numel() else total.clone(),
        "turns": (in_turn > 0).sum().to(total.dtype),
        "tokens": total,
    }
    if tokens.entropy is not None:
        metrics["entropy"] = mean(tokens.entropy)
    if terms.kl is not None:
        metrics["ref_kl"] = mean(terms.kl)
    return metrics


def token_terms(tokens: LossTokens, config: LossConfig) -> TokenTerms:
    """Compute loss, derivatives and clipping of every token."""
    delta = tokens.logprob - tokens.old_logprob
    policy = _path_term(tokens, delta, tokens.paths, config) if tokens.paths else _group_term(tokens, delta, config)
    trust = _importance(tokens, config)
    gain, grad = (policy.gain, policy.grad) if trust is None else (policy.gain * trust, policy.grad * trust)
    value = gain + grad * tokens.logprob if config.clip == "cispo" else gain
    kl = None
    if config.needs_reference:
        assert tokens.ref_logprob is not None
        kl, kl_grad = kl_terms(tokens.logprob, tokens.ref_logprob, config.kl)
        value = value + config.kl_coef * tokens.weights.all * kl
        grad = grad + config.kl_coef * tokens.weights.all * kl_grad
    grad_entropy = None
    if config.needs_entropy:
        assert tokens.entropy is not None
        grad_entropy = -config.entropy_coef * tokens.weights.all
        value = value + grad_entropy * tokens.entropy
    return TokenTerms(value, grad, grad_entropy, policy.ratio, policy.clipped_low, policy.clipped_high, kl)


def surrogate(ratio: Tensor, bounds: Bounds, config: LossConfig) -> Surrogate:
    """Compute g+ and g- of the clip family, with the dual cap of g-."""
    found = _family(ratio, *bounds, config)
    if config.dual_cap is not None:
        capped = ratio > config.dual_cap
        found.gain_neg = found.gain_neg.masked_fill(capped, config.dual_cap)
        found.grad_neg = found.grad_neg.masked_fill(capped, 0)
    return found


def _family(ratio: Tensor, low: Tensor | float, high: Tensor | float, config: LossConfig) -> Surrogate:
    """Compute g+ and g- of the clip family without a dual cap."""
    if config.clip == "sapo":
        return Surrogate(*_gate(ratio, config.sapo_tau_pos), *_gate(ratio, config.sapo_tau_neg))
    if config.clip == "cispo":
        clipped, nothing = ratio.clamp_min(low).clamp_max(high), torch.zeros_like(ratio)
        return Surrogate(nothing, clipped, nothing, clipped)
    gain_pos, gain_neg = ratio.clamp_max(high), ratio.clamp_min(low)
    grad_pos = gain_pos if config.clip in ("soft", "soft_high") else ratio.masked_fill(ratio > high, 0)
    grad_neg = gain_neg if config.clip == "soft" else ratio.masked_fill(ratio < low, 0)
    return Surrogate(gain_pos, grad_pos, gain_neg, grad_neg)


def kl_terms(logprob: Tensor, ref_logprob: Tensor, mode: KLEstimator) -> tuple[Tensor, Tensor]:
    """Estimate the KL of every token, and its derivative by logprob; low_var is k3 with argument and value clamped."""
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
    """Give every token the mean of `values` (A,) over the valid tokens of its group."""
    ones = torch.ones_like(values) if tokens.valid is None else tokens.valid.to(values.dtype)
    sums = values.new_zeros(num_groups).index_add_(0, group, values)
    counts = values.new_zeros(num_groups).index_add_(0, group, ones)
    return (sums / counts.clamp_min_(1))[group]


def approximate_kl(delta: Tensor, config: LossConfig) -> Tensor:
    """Estimate KL(old || new) of every token by k3, from delta = logprob - old_logprob, capped as the ratio is."""
    return _k3(-delta.clamp_max(config.max_log_ratio))


def _k3(gap: Tensor) -> Tensor:
    """Compute exp(-gap) - 1 + gap, exact for small gaps."""
    return torch.expm1(-gap) + gap


def _gate(ratio: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Compute 4/tau * sigmoid(tau (rho - 1)) and its derivative by logprob."""
    sigmoid = torch.sigmoid(tau * (ratio - 1))
    return sigmoid * (4 / tau), 4 * sigmoid * (1 - sigmoid) * ratio


def _group_term(tokens: LossTokens, delta: Tensor, config: LossConfig) -> PolicyTerm:
    """Evaluate ratio levels token and turn, and sequence where a token belongs to one sequence."""
    mean = delta if tokens.group is None else mean_by_group(delta, tokens, tokens.group, tokens.num_groups)
    bounds = _config_bounds(config) if tokens.bounds is None else tokens.bounds
    return _weighted(mean, tokens.weights.pos, tokens.weights.neg, bounds, config)


def _path_term(tokens: LossTokens, delta: Tensor, paths: LeafPaths, config: LossConfig) -> PolicyTerm:
    """Evaluate ratio level sequence on packed turns: a turn adds up the terms of the trajectories through it."""
    turns = paths.turns.long()
    leaf = torch.bucketize(
        torch.arange(turns.numel(), device=turns.device, dtype=paths.offsets.dtype),
        paths.offsets[1:].contiguous(),
        right=True,
    )
    leaves = paths.offsets.numel() - 1
    by_turn = delta.new_zeros(2, tokens.num_turns).index_add_(1, tokens.turn, torch.stack([delta, _ones(tokens)]))
    by_leaf = delta.new_zeros(2, leaves).index_add_(1, leaf, by_turn[:, turns])
    log_ratio = (by_leaf[0] / by_leaf[1].clamp_min(1))[leaf]
    weight_pos, weight_neg = (w.detach().to(delta.dtype) for w in (paths.weight_pos, paths.weight_neg))
    term = _weighted(log_ratio, weight_pos, weight_neg, _config_bounds(config), config)
    ones = torch.ones_like(log_ratio)
    parts = torch.stack([term.gain, term.grad, term.ratio, term.clipped_low, term.clipped_high, ones])
    sums = delta.new_zeros(6, tokens.num_turns).index_add_(1, turns, parts)
    sums[2:5] /= sums[5].clamp_min(1)
    on_tokens = sums[:5, tokens.turn]
    if tokens.valid is not None:
        on_tokens = on_tokens * tokens.valid
    return PolicyTerm(*on_tokens.unbind())


def _weighted(
    log_ratio: Tensor, weight_pos: Tensor, weight_neg: Tensor, bounds: Bounds, config: LossConfig
) -> PolicyTerm:
    """Weigh both signs of the advantage together."""
    ratio = log_ratio.clamp_max(config.max_log_ratio).exp()
    g = surrogate(ratio, bounds, config)
    gain = weight_neg * g.gain_neg - weight_pos * g.gain_pos
    grad = weight_neg * g.grad_neg - weight_pos * g.grad_pos
    if config.clip != "cispo":  # whose gradient does not go through the ratio
        grad = grad.masked_fill(log_ratio > config.max_log_ratio, 0)
    low, high = _clipped(ratio, weight_pos > 0, weight_neg > 0, bounds, config)
    return PolicyTerm(gain, grad, ratio, low.to(ratio.dtype), high.to(ratio.dtype))


def _clipped(
    ratio: Tensor, positive: Tensor, negative: Tensor, bounds: Bounds, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Say where the lower bound replaces rho in a term of weight > 0, and where the upper one or the cap does."""
    below, above = ratio < bounds[0], ratio > bounds[1]
    if config.clip == "sapo":  # a gate has no bounds
        below, above = torch.zeros_like(below), torch.zeros_like(above)
    elif config.clip == "cispo":
        below, above = below & (positive | negative), above & (positive | negative)
    else:
        below, above = below & negative, above & positive
    if config.dual_cap is not None:
        above = above | (negative & (ratio > config.dual_cap))
    return below, above


def _config_bounds(config: LossConfig) -> tuple[float, float]:
    """Return the lower and the upper bound of the ratio that hold for every token."""
    return 1 - config.clip_low, 1 + config.clip_high


def _importance(tokens: LossTokens, config: LossConfig) -> Tensor | None:
    """Compute truncated importance weights (A,) of the sampling engine against the trainer; None: off."""
    if config.importance_cap is None:
        return None
    assert tokens.rollout_logprob is not None
    return (tokens.old_logprob - tokens.rollout_logprob).exp().clamp_max(config.importance_cap)


def _ones(tokens: LossTokens) -> Tensor:
    """Mark valid tokens by 1, others by 0: (A,)."""
    return torch.ones_like(tokens.logprob) if tokens.valid is None else tokens.valid.to(tokens.logprob.dtype)
