"""Kernel of the policy loss of packed turns: one program per turn, whatever its length."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from atpo_kernels.turn_policy_loss.kernels.paths import path_term, place_turn, sum_turn
from atpo_kernels.turn_policy_loss.kernels.sums import (
    TOKENS,
    evaluate_tokens,
    is_valid,
    load_weights,
    log_ratios,
    no_sums,
    store_sums,
)
from atpo_kernels.turn_policy_loss.kernels.terms import clamp_min, policy_term

# Vectors over tokens are read from the start of a turn, which may lie anywhere: where they begin is not asked.
_ANY_ALIGNMENT = ["logprob", "entropy", "old_logprob", "ref_logprob", "rollout_logprob", "mask", "advantages"]
_ANY_ALIGNMENT += ["weight_pos", "weight_neg", "weight_all", "turn_clip_low", "turn_clip_high", "denominator"]
_ANY_ALIGNMENT += ["turn_offsets", "entry_offsets", "entries", "entry_leaf", "leaf_log_ratio", "path_pos", "path_neg"]
_ANY_ALIGNMENT += ["grad_logprob", "grad_entropy", "value", "partial"]


@triton.jit(do_not_specialize=["first_turn", "columns"], do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _turns_kernel(
    logprob, entropy, old_logprob, ref_logprob, rollout_logprob, mask, advantages, weight_pos, weight_neg, weight_all,
    turn_clip_low, turn_clip_high, denominator, turn_offsets,
    entry_offsets, entries, entry_leaf, leaf_log_ratio, path_pos, path_neg,
    grad_logprob, grad_entropy, value, partial, first_turn, columns, scale,
    low, high, dual_cap, tau_pos, tau_neg, max_log_ratio, importance_cap, kl_coef, entropy_coef,
    LEVEL: tl.constexpr, CLIP: tl.constexpr, KL: tl.constexpr, REDUCTION: tl.constexpr, BY_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute loss and derivatives of the tokens of one turn, and its column of the partial sums (ROWS, columns)."""
    turn = first_turn + tl.program_id(0)
    base, length = place_turn(turn_offsets, turn)
    # 1. size of the turn and sum of its log-ratios
    total, size = sum_turn(logprob, old_logprob, mask, base, length, LEVEL == "turn", BLOCK)
    # 2. aggregation weight of its tokens
    share = scale
    if denominator is not None:
        share = share / tl.load(denominator).to(tl.float32)
    units = size
    if REDUCTION == "turn-mean":
        share = share / clamp_min(size, 1.0)
        units = tl.where(size > 0, 1.0, 0.0)
    # 3. the policy term where it does not depend on the token
    if LEVEL == "sequence":
        term = path_term(
            turn, entry_offsets, entries, entry_leaf, leaf_log_ratio, path_pos, path_neg,
            low, high, dual_cap, tau_pos, tau_neg, max_log_ratio, CLIP,
        )  # fmt: skip
    if turn_clip_low is not None:
        low = 1 - tl.load(turn_clip_low + turn).to(tl.float32)
    if turn_clip_high is not None:
        high = 1 + tl.load(turn_clip_high + turn).to(tl.float32)
    # 4. the tokens
    sums = no_sums()
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < length
        valid = is_valid(mask, base, t, inside)
        pos, neg, every = load_weights(
            advantages, weight_pos, weight_neg, weight_all, base, t, turn, valid, share, BY_TOKEN
        )  # fmt: skip
        if LEVEL == "sequence":
            gain, grad, ratio, clipped_low, clipped_high = term
        else:
            log_ratio = tl.full((BLOCK,), 0.0, tl.float32) + total / clamp_min(size, 1.0)
            if LEVEL == "token":
                log_ratio = log_ratios(logprob, old_logprob, base, t, valid)
            gain, grad, ratio, clipped_low, clipped_high = policy_term(
                log_ratio, pos, neg, low, high, dual_cap, tau_pos, tau_neg, max_log_ratio, CLIP
            )
        sums = evaluate_tokens(
            sums, base, t, inside, valid, gain, grad, ratio, clipped_low, clipped_high, every,
            logprob, old_logprob, ref_logprob, rollout_logprob, entropy, grad_logprob, grad_entropy, value,
            max_log_ratio, importance_cap, kl_coef, entropy_coef, CLIP, KL,
        )  # fmt: skip
    # 5. their sums
    turns = tl.where(sums[TOKENS] > 0, 1.0, 0.0)
    store_sums(sums, turns, units, partial, turn, columns)
