"""Maths of the policy loss on blocks of tokens in float32: the same functions as in torch_impl.py.

Bounds are compared with `tl.where`, since tl.minimum and tl.maximum drop a NaN that has to reach the loss.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def policy_term(
    log_ratio, weight_pos, weight_neg, low, high, dual_cap, tau_pos, tau_neg, max_log_ratio, CLIP: tl.constexpr
):  # fmt: skip
    """Compute gain, grad, ratio, clipped_low and clipped_high, both signs of the advantage together.

    low and high are the bounds of the ratio themselves, 1 - clip_low and 1 + clip_high; dual_cap may be None. The last
    two results are 0 or 1: whether a bound takes the place of the ratio. With CLIP "cispo", grad times the log-prob is
    still to be added to gain.
    """
    ratio = tl.exp(clamp_max(log_ratio, max_log_ratio))
    gain_pos, grad_pos, gain_neg, grad_neg = surrogate(ratio, low, high, dual_cap, tau_pos, tau_neg, CLIP)
    gain = weight_neg * gain_neg - weight_pos * gain_pos
    grad = weight_neg * grad_neg - weight_pos * grad_pos
    if CLIP != "cispo":  # whose gradient does not go through the ratio
        grad = tl.where(log_ratio > max_log_ratio, 0.0, grad)
    below, above = clipped(ratio, weight_pos > 0, weight_neg > 0, low, high, dual_cap, CLIP)
    return gain, grad, ratio, tl.where(below, 1.0, 0.0), tl.where(above, 1.0, 0.0)


@triton.jit
def token_terms(
    gain, grad, logprob, old_logprob, ref_logprob, rollout_logprob, entropy, weight_all,
    importance_cap, kl_coef, entropy_coef, CLIP: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """Compute loss, grad_logprob, grad_entropy and kl of every token.

    ref_logprob, rollout_logprob and entropy are None where the loss does not read them: their terms are 0.
    """
    if rollout_logprob is not None:
        trust = clamp_max(tl.exp(old_logprob - rollout_logprob), importance_cap)
        gain *= trust
        grad *= trust
    value = gain
    if CLIP == "cispo":
        value = gain + grad * logprob
    kl = tl.zeros_like(weight_all)
    if ref_logprob is not None:
        kl, kl_grad = kl_terms(logprob, ref_logprob, KL)
        value += kl_coef * weight_all * kl
        grad += kl_coef * weight_all * kl_grad
    grad_entropy = tl.zeros_like(weight_all)
    if entropy is not None:
        grad_entropy = -entropy_coef * weight_all
        value += grad_entropy * entropy
    return value, grad, grad_entropy, kl


@triton.jit
def surrogate(ratio, low, high, dual_cap, tau_pos, tau_neg, CLIP: tl.constexpr):
    """Compute g+ and g- of the clip family, with the cap of g-, and their derivatives by logprob.

    In the order gain_pos, grad_pos, gain_neg, grad_neg.
    """
    if CLIP == "sapo":
        gain_pos, grad_pos = gate(ratio, tau_pos)
        gain_neg, grad_neg = gate(ratio, tau_neg)
    elif CLIP == "cispo":
        grad_pos = clamp_max(clamp_min(ratio, low), high)
        gain_pos, gain_neg, grad_neg = tl.zeros_like(ratio), tl.zeros_like(ratio), grad_pos
    else:
        gain_pos, gain_neg = clamp_max(ratio, high), clamp_min(ratio, low)
        grad_pos, grad_neg = tl.where(ratio > high, 0.0, ratio), tl.where(ratio < low, 0.0, ratio)
        if CLIP == "soft" or CLIP == "soft_high":
            grad_pos = gain_pos
        if CLIP == "soft":
            grad_neg = gain_neg
    if dual_cap is not None:
        grad_neg = tl.where(ratio > dual_cap, 0.0, grad_neg)
        gain_neg = tl.where(ratio > dual_cap, dual_cap, gain_neg)
    return gain_pos, grad_pos, gain_neg, grad_neg


@triton.jit
def clipped(ratio, positive, negative, low, high, dual_cap, CLIP: tl.constexpr):
    """Say where the lower bound replaces the ratio in a term of weight > 0, and where the upper one or the cap does.

    A sapo gate has no bounds.
    """
    below, above = ratio < low, ratio > high
    if CLIP == "sapo":
        clipped_low, clipped_high = below & ~below, above & ~above
    elif CLIP == "cispo":
        clipped_low, clipped_high = below & (positive | negative), above & (positive | negative)
    else:
        clipped_low, clipped_high = below & negative, above & positive
    if dual_cap is not None:
        clipped_high = clipped_high | (negative & (ratio > dual_cap))
    return clipped_low, clipped_high


@triton.jit
def kl_terms(logprob, ref_logprob, KL: tl.constexpr):
    """Estimate the KL of every token, and its derivative by logprob; low_var is k3 with argument and value clamped."""
    gap = logprob - ref_logprob
    if KL == "k1":
        kl, grad = gap, tl.full(gap.shape, 1.0, tl.float32)
    elif KL == "k2":
        kl, grad = gap * gap / 2, gap
    elif KL == "k3":
        kl, grad = k3(gap)
    else:
        bounded = clamp_max(clamp_min(gap, -20.0), 20.0)
        kl, grad = k3(bounded)
        grad = tl.where((bounded == gap) & (kl <= 10), grad, 0.0)
        kl = clamp_max(kl, 10.0)
    return kl, grad


@triton.jit
def approximate_kl(delta, max_log_ratio):
    """Estimate KL(old || new) of every token by k3, from delta = logprob - old_logprob, capped as the ratio is."""
    kl, _ = k3(-clamp_max(delta, max_log_ratio))
    return kl


@triton.jit
def k3(gap):
    """Compute exp(-gap) - 1 + gap and its derivative 1 - exp(-gap).

    Near 0 these terms cancel. There the first is the series x^2/2 (1 + x/3 (1 + x/4 (...))) of x = -gap, whose
    remainder at |x| = 1 is below 1e-9 of it, and the second is gap less the first.
    """
    x = -gap
    grown = tl.exp(x)
    series = tl.full(gap.shape, 1.0, tl.float32)
    for i in tl.static_range(0, 10):
        series = 1 + series * x * (1 / (12 - i))
    series *= x * x * 0.5
    near = tl.abs(gap) < 1
    return tl.where(near, series, grown - 1 + gap), tl.where(near, gap - series, 1 - grown)


@triton.jit
def gate(ratio, tau):
    """Compute 4/tau * sigmoid(tau (rho - 1)) and its derivative by logprob."""
    sigmoid = tl.sigmoid(tau * (ratio - 1))
    return sigmoid * (4 / tau), 4 * sigmoid * (1 - sigmoid) * ratio


@triton.jit
def clamp_max(x, bound):
    """Bound x from above; NaN stays NaN."""
    return tl.where(x > bound, bound, x)


@triton.jit
def clamp_min(x, bound):
    """Bound x from below; NaN stays NaN."""
    return tl.where(x < bound, bound, x)
