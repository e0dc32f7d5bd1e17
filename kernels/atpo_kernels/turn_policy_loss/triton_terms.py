"""The maths of the policy loss on the device: the same functions as in terms.py, on float32 blocks of tokens.

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
    """gain, slope, ratio, cut_low, cut_high of both signs of the advantage together; the cuts are 0 or 1.

    low and high are the bounds of the ratio themselves, 1 - clip_low and 1 + clip_high.
    """
    ratio = tl.exp(clamp_max(log_ratio, max_log_ratio))
    gain_pos, slope_pos, gain_neg, slope_neg = surrogate(ratio, low, high, dual_cap, tau_pos, tau_neg, CLIP)
    gain = weight_neg * gain_neg - weight_pos * gain_pos
    slope = weight_neg * slope_neg - weight_pos * slope_pos
    cut_low, cut_high = cuts(ratio, weight_pos > 0, weight_neg > 0, low, high, dual_cap, CLIP)
    return gain, slope, ratio, tl.where(cut_low, 1.0, 0.0), tl.where(cut_high, 1.0, 0.0)


@triton.jit
def token_terms(
    gain, slope, logprob, old_logprob, ref_logprob, rollout_logprob, entropy, weight_all,
    importance_cap, kl_coef, entropy_coef, CLIP: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """value, coef, entropy_slope, kl of every token.

    ref_logprob, rollout_logprob and entropy are None where the loss does not read them: their terms are 0.
    """
    if rollout_logprob is not None:
        trust = clamp_max(tl.exp(old_logprob - rollout_logprob), importance_cap)
        gain *= trust
        slope *= trust
    value = gain
    if CLIP == "cispo":
        value = gain * logprob
    kl = tl.zeros_like(weight_all)
    if ref_logprob is not None:
        kl, kl_slope = kl_terms(logprob, ref_logprob, KL)
        value += kl_coef * weight_all * kl
        slope += kl_coef * weight_all * kl_slope
    entropy_slope = tl.zeros_like(weight_all)
    if entropy is not None:
        entropy_slope = -entropy_coef * weight_all
        value += entropy_slope * entropy
    return value, slope, entropy_slope, kl


@triton.jit
def surrogate(ratio, low, high, dual_cap, tau_pos, tau_neg, CLIP: tl.constexpr):
    """g+ and g- of the clip family: gain_pos, slope_pos, gain_neg, slope_neg."""
    if CLIP == "sapo":
        gain_pos, slope_pos = gate(ratio, tau_pos)
        gain_neg, slope_neg = gate(ratio, tau_neg)
    elif CLIP == "cispo":
        gain_pos = clamp_max(clamp_min(ratio, low), high)
        slope_pos, gain_neg, slope_neg = gain_pos, gain_pos, gain_pos
    else:
        gain_pos, gain_neg = clamp_max(ratio, high), clamp_min(ratio, low)
        slope_pos, slope_neg = tl.where(ratio > high, 0.0, ratio), tl.where(ratio < low, 0.0, ratio)
        if CLIP == "soft" or CLIP == "soft_high":
            slope_pos = gain_pos
        if CLIP == "soft":
            slope_neg = gain_neg
        if CLIP == "dual":
            slope_neg = tl.where(ratio > dual_cap, 0.0, slope_neg)
            gain_neg = clamp_max(gain_neg, dual_cap)
    return gain_pos, slope_pos, gain_neg, slope_neg


@triton.jit
def cuts(ratio, positive, negative, low, high, dual_cap, CLIP: tl.constexpr):
    """Where the lower and the upper bound replace the ratio in a term of weight > 0. A sapo gate has no bounds."""
    below, above = ratio < low, ratio > high
    if CLIP == "sapo":
        cut_low, cut_high = below & ~below, above & ~above
    elif CLIP == "cispo":
        cut_low, cut_high = below & (positive | negative), above & (positive | negative)
    else:
        cut_low, cut_high = below & negative, above & positive
        if CLIP == "dual":
            cut_high = cut_high | (negative & (ratio > dual_cap))
    return cut_low, cut_high


@triton.jit
def kl_terms(logprob, ref_logprob, KL: tl.constexpr):
    """KL estimate of every token and its derivative by logprob; low_var is k3 with its argument and value clamped."""
    gap = logprob - ref_logprob
    if KL == "k1":
        kl, slope = gap, tl.full(gap.shape, 1.0, tl.float32)
    elif KL == "k2":
        kl, slope = gap * gap / 2, gap
    elif KL == "k3":
        kl, slope = k3(gap)
    else:
        bounded = clamp_max(clamp_min(gap, -20.0), 20.0)
        kl, slope = k3(bounded)
        slope = tl.where((bounded == gap) & (kl <= 10), slope, 0.0)
        kl = clamp_max(kl, 10.0)
    return kl, slope


@triton.jit
def approximate_kl(delta, max_log_ratio):
    """k3 estimate of KL(old || new) by token, from delta = logprob - old_logprob, capped as the ratio is."""
    kl, _ = k3(-clamp_max(delta, max_log_ratio))
    return kl


@triton.jit
def k3(gap):
    """exp(-gap) - 1 + gap and its derivative 1 - exp(-gap).

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
    """4/tau * sigmoid(tau (rho - 1)) and its derivative by logprob."""
    open_share = tl.sigmoid(tau * (ratio - 1))
    return open_share * (4 / tau), 4 * open_share * (1 - open_share) * ratio


@triton.jit
def clamp_max(x, bound):
    return tl.where(x > bound, bound, x)


@triton.jit
def clamp_min(x, bound):
    return tl.where(x < bound, bound, x)
