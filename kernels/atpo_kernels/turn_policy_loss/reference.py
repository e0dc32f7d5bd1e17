"""Definition of `turn_policy_loss`: its formulas under autograd, one turn at a time (docs/design.md#objective)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from atpo_kernels.arguments import LossArguments
from atpo_kernels.records import LossConfig
from atpo_kernels.tokens import LossTokens, loss_tokens
from atpo_kernels.turn_policy_loss.torch_impl import Evaluation, TokenTerms, loss_metrics


def turn_policy_loss_reference(arguments: LossArguments) -> Evaluation:
    """Compute `turn_policy_loss` by its definition; see there."""
    return evaluate_reference(loss_tokens(arguments), arguments.config, arguments.by_token)


def evaluate_reference(tokens: LossTokens, config: LossConfig, by_token: bool) -> Evaluation:
    """Evaluate a line of tokens, with derivatives by autograd through the straight-through ratio."""
    with torch.enable_grad():
        logprob = tokens.logprob.detach().requires_grad_()
        entropy = None if tokens.entropy is None else tokens.entropy.detach().requires_grad_()
        value, ratio, low, high, kl = _loss_by_token(tokens, logprob, entropy, config)
        wanted = [logprob] if entropy is None else [logprob, entropy]
        grads = torch.autograd.grad(value.sum(), wanted, allow_unused=True)
    grad_entropy = grads[1] if config.needs_entropy else None
    value = value.detach()
    terms = TokenTerms(value, grads[0], grad_entropy, ratio, low, high, kl)
    return Evaluation(value if by_token else value.sum(), grads[0], grad_entropy, loss_metrics(tokens, terms, config))


def clipped_loss(
    ratio: Tensor,  # (n,) as below
    logprob: Tensor,
    pos: Tensor,
    neg: Tensor,
    bounds: tuple[Tensor, Tensor],
    config: LossConfig,
) -> Tensor:
    """Compute -W+ g+(rho) + W- g-(rho), literally."""
    gain_pos, gain_neg = _gains(ratio, logprob, *bounds, config)
    if config.dual_cap is not None:
        gain_neg = torch.where(ratio > config.dual_cap, torch.full_like(ratio, config.dual_cap), gain_neg)
    return neg * gain_neg - pos * gain_pos


def _gains(
    ratio: Tensor, logprob: Tensor, low: Tensor, high: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:  # (n,) each
    """Compute g+(rho) and g-(rho) of the clip family."""
    if config.clip == "cispo":
        gain = torch.minimum(torch.maximum(ratio, low), high).detach() * logprob
        return gain, gain
    if config.clip == "sapo":
        tau_pos, tau_neg = config.sapo_tau_pos, config.sapo_tau_neg
        gain_pos = 4 / tau_pos * torch.sigmoid(tau_pos * (ratio - 1))
        return gain_pos, 4 / tau_neg * torch.sigmoid(tau_neg * (ratio - 1))
    bound_high = high * ratio / ratio.detach() if config.clip in ("soft", "soft_high") else high
    bound_low = low * ratio / ratio.detach() if config.clip == "soft" else low
    return torch.where(ratio > high, bound_high, ratio), torch.where(ratio < low, bound_low, ratio)


def _bounds(tokens: LossTokens, config: LossConfig) -> tuple[Tensor, Tensor]:  # (A,) each
    """Return the lower and the upper bound of every token's ratio."""
    if tokens.bounds is not None:
        return tokens.bounds
    return torch.full_like(tokens.logprob, 1 - config.clip_low), torch.full_like(tokens.logprob, 1 + config.clip_high)


def reference_kl(logprob: Tensor, ref_logprob: Tensor, config: LossConfig) -> Tensor:
    """Estimate the KL to the reference policy at every token."""
    gap = ref_logprob - logprob
    if config.kl == "k1":
        return -gap
    if config.kl == "k2":
        return gap.square() / 2
    if config.kl == "k3":
        return gap.exp() - gap - 1
    gap = gap.clamp(-20, 20)
    return (gap.exp() - gap - 1).clamp(-10, 10)


def _loss_by_token(
    tokens: LossTokens, logprob: Tensor, entropy: Tensor | None, config: LossConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Compute loss, ratio, clipping and KL of every token."""
    value, shown = 0 * logprob, torch.zeros_like(logprob).repeat(3, 1)
    times = torch.zeros_like(logprob)
    trust = torch.ones_like(logprob)
    every_low, every_high = _bounds(tokens, config)
    if config.importance_cap is not None:
        assert tokens.rollout_logprob is not None
        trust = (tokens.old_logprob - tokens.rollout_logprob).exp().clamp(max=config.importance_cap)
    for members, pos, neg in _ratio_groups(tokens):
        log_ratio = (logprob - tokens.old_logprob)[members].detach().mean()
        straight = logprob[members] - logprob[members].detach()
        ratio = (log_ratio + straight).clamp(max=config.max_log_ratio).exp()
        bounds = every_low[members], every_high[members]
        loss = clipped_loss(ratio, logprob[members], pos, neg, bounds, config)
        value = value.index_put((members,), trust[members] * loss, accumulate=True)
        shown[:, members] += _marks(ratio.detach(), pos, neg, bounds, config)
        times[members] += 1
    shown = shown / times.clamp(min=1)
    kl = None
    if config.needs_reference:
        assert tokens.ref_logprob is not None
        kl = reference_kl(logprob, tokens.ref_logprob, config)
        value = value + config.kl_coef * tokens.weights.all * kl
    if config.needs_entropy:
        assert entropy is not None
        value = value - config.entropy_coef * tokens.weights.all * entropy
    return value, shown[0], shown[1], shown[2], None if kl is None else kl.detach()


def _ratio_groups(tokens: LossTokens) -> list[tuple[Tensor, Tensor, Tensor]]:
    """List the groups that share a ratio: (indices, W+, W-) of their tokens; a token may be in many trajectories."""
    valid = torch.ones_like(tokens.turn, dtype=torch.bool) if tokens.valid is None else tokens.valid
    if tokens.paths is None:
        group = torch.arange(tokens.turn.numel(), device=valid.device) if tokens.group is None else tokens.group
        found = [((group == g) & valid).nonzero().squeeze(1) for g in group[valid].unique()]
        return [(members, tokens.weights.pos[members], tokens.weights.neg[members]) for members in found]
    groups, bounds = [], tokens.paths.offsets.tolist()
    for start, end in pairwise(bounds):
        entry = [((tokens.turn == tokens.paths.turns[p]) & valid).nonzero().squeeze(1) for p in range(start, end)]
        pos = [tokens.paths.weight_pos[p].to(tokens.logprob.dtype).expand(len(m)) for p, m in enumerate(entry, start)]
        neg = [tokens.paths.weight_neg[p].to(tokens.logprob.dtype).expand(len(m)) for p, m in enumerate(entry, start)]
        if entry:
            groups.append((torch.cat(entry), torch.cat(pos), torch.cat(neg)))
    return groups


def _marks(ratio: Tensor, pos: Tensor, neg: Tensor, bounds: tuple[Tensor, Tensor], config: LossConfig) -> Tensor:
    """Stack (3, n): ratio, whether the lower bound replaces it, whether the upper bound or the cap does."""
    low, high = ratio < bounds[0], ratio > bounds[1]
    if config.clip == "sapo":
        low, high = torch.zeros_like(low), torch.zeros_like(high)
    elif config.clip == "cispo":
        low, high = low & (pos + neg > 0), high & (pos + neg > 0)
    else:
        low, high = low & (neg > 0), high & (pos > 0)
    if config.dual_cap is not None:
        high = high | ((neg > 0) & (ratio > config.dual_cap))
    return torch.stack([ratio, low, high])
