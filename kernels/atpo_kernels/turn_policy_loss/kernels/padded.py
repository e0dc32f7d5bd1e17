"""Kernel of the policy loss of padded batches: one program per row, whatever its length and number of turns.

A turn is a run of the mask, or of one id among the valid tokens. Two passes over a row: forwards, sums within each turn
as far as the token; backwards, all tokens of a turn get the value of its last one.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from atpo_kernels.turn_policy_loss.kernels.sums import (
    evaluate_tokens,
    is_valid,
    load,
    load_weights,
    log_ratios,
    no_sums,
    store_sums,
)
from atpo_kernels.turn_policy_loss.kernels.terms import clamp_min, policy_term


@triton.jit
def sum_from_start(starts, total, starts_2, total_2):
    """Combine two stretches of a running sum that begins again at every start."""
    return starts | starts_2, total_2 + tl.where(starts_2 != 0, 0.0, total)


@triton.jit
def value_at_end(ends, values, ends_2, values_2):
    """Combine two stretches of a backward scan: a position takes the value of the nearest end at or behind it."""
    return ends | ends_2, tl.where(ends_2 != 0, values_2, values)


@triton.jit
def latest(ids, ids_2):
    """Combine two stretches: the last id that is not -1."""
    return tl.where(ids_2 >= 0, ids_2, ids)


@triton.jit
def scan_turns(first, values, carry):
    """Sum within each turn as far as the position; `carry` is the sum of the open turn before the block."""
    seen, total = tl.associative_scan((first.to(tl.int32), values), 0, sum_from_start)
    return total + tl.where(seen == 0, carry, 0.0)


@triton.jit
def hand_back(last, values, carry):
    """Give all positions of a turn the value of its last; `carry` is that of the turn that continues behind."""
    seen, values = tl.associative_scan((last.to(tl.int32), values), 0, value_at_end, reverse=True)
    return tl.where(seen == 0, carry, values)


@triton.jit
def element(values, index, BLOCK: tl.constexpr):
    """Return the element of a block at `index`."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == index, values, 0), 0)


@triton.jit
def id_before(mask, turn_ids, base, t, length, carry):
    """Find the id of the last valid token before t, `carry` where that lies before the block; -1: there is none.

    Without turn_ids a run ends where the mask does: 0 where t - 1 is valid, else -1.
    """
    valid = is_valid(mask, base - 1, t, (t > 0) & (t <= length))
    if turn_ids is None:
        before = tl.where(valid, 0, -1)
    else:
        ids = tl.load(turn_ids + base - 1 + t, mask=valid, other=0).to(tl.int32)
        before = tl.associative_scan(tl.where(valid, ids, -1), 0, latest)
        before = tl.where(before < 0, carry, before)
    return before


# Vectors over tokens are read from the start of a row, which may lie anywhere, as rows may be of any length.
_ANY_ALIGNMENT = ["logprob", "entropy", "old_logprob", "ref_logprob", "rollout_logprob", "mask", "turn_ids"]
_ANY_ALIGNMENT += ["advantages", "weight_pos", "weight_neg", "weight_all", "denominator", "running_mean"]
_ANY_ALIGNMENT += ["running_size", "grad_logprob", "grad_entropy", "value", "partial"]


@triton.jit(do_not_specialize=["length", "columns"], do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _rows_kernel(
    logprob, entropy, old_logprob, ref_logprob, rollout_logprob, mask, turn_ids, advantages,
    weight_pos, weight_neg, weight_all, denominator, running_mean, running_size,
    grad_logprob, grad_entropy, value, partial, length, columns, scale,
    low, high, dual_cap, tau_pos, tau_neg, max_log_ratio, importance_cap, kl_coef, entropy_coef,
    LEVEL: tl.constexpr, CLIP: tl.constexpr, KL: tl.constexpr, REDUCTION: tl.constexpr, BY_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute loss and derivatives of the tokens of one row, and its column of the partial sums (ROWS, columns).

    running_mean and running_size, (B, T) scratch: log-ratio and number of tokens of a turn as far as the token; None
    where neither the ratio nor the weights depend on the turn.
    """
    row = tl.program_id(0)
    base = row.to(tl.int64) * length
    blocks = tl.cdiv(length, BLOCK)
    # 1. forwards: tokens and counted turns of the row, running sums of the turns
    tokens, turns, total = 0.0, 0.0, 0.0
    open_sum, open_size, open_counted = 0.0, 0.0, 0.0
    open_id = tl.full((), -1, tl.int32)
    for block in range(0, blocks):
        t = block * BLOCK + tl.arange(0, BLOCK)
        valid = is_valid(mask, base, t, t < length)
        before = id_before(mask, turn_ids, base, t, length, open_id)
        open_id = element(before, BLOCK - 1, BLOCK)
        ids = tl.zeros_like(t)
        if turn_ids is not None:
            ids = tl.load(turn_ids + base + t, mask=valid, other=0).to(tl.int32)
        first = valid & (ids != before)
        tokens += tl.sum(tl.where(valid, 1.0, 0.0), 0)
        if advantages is not None:
            turns += tl.sum(tl.where(first, 1.0, 0.0), 0)
        else:
            # weights may be 0: a turn counts where its first counted token is
            counted = tl.where(load(weight_all, base, t, valid) > 0, 1.0, 0.0)
            found = scan_turns(first, counted, open_counted)
            open_counted = element(found, BLOCK - 1, BLOCK)
            turns += tl.sum(tl.where(found == 1, counted, 0.0), 0)
        if LEVEL == "sequence":
            total += tl.sum(log_ratios(logprob, old_logprob, base, t, valid), 0)
        if running_size is not None:
            size = scan_turns(first, tl.where(valid, 1.0, 0.0), open_size)
            open_size = element(size, BLOCK - 1, BLOCK)
            tl.store(running_size + base + t, size, mask=t < length)
        if running_mean is not None:
            summed = scan_turns(first, log_ratios(logprob, old_logprob, base, t, valid), open_sum)
            open_sum = element(summed, BLOCK - 1, BLOCK)
            tl.store(running_mean + base + t, summed / clamp_min(size, 1.0), mask=t < length)
    # 2. aggregation weight
    share = scale
    if denominator is not None:
        share = share / tl.load(denominator).to(tl.float32)
    if REDUCTION == "seq-mean-token-mean":
        share = share / clamp_min(tokens, 1.0)
    if REDUCTION == "turn-mean":
        share = share / clamp_min(turns, 1.0)
    # 3. backwards: what belongs to a whole turn, then its tokens. The running sums are other threads'
    tl.debug_barrier()
    sums = no_sums()
    mean_behind, size_behind = 0.0, 1.0
    for block in range(0, blocks):
        t = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        inside = t < length
        valid = is_valid(mask, base, t, inside)
        token_share = share
        if running_size is not None:
            # behind t a turn begins where a valid token is the first of its turn
            follows = is_valid(mask, base + 1, t, t + 1 < length)
            last = (follows & (load(running_size, base + 1, t, follows) == 1)) | (t + 1 >= length)
        if REDUCTION == "turn-mean":
            size = hand_back(last, load(running_size, base, t, inside), size_behind)
            size_behind = element(size, 0, BLOCK)
            token_share = share / clamp_min(size, 1.0)
        if LEVEL == "turn":
            log_ratio = hand_back(last, load(running_mean, base, t, inside), mean_behind)
            mean_behind = element(log_ratio, 0, BLOCK)
        elif LEVEL == "sequence":
            log_ratio = tl.full((BLOCK,), 0.0, tl.float32) + total / clamp_min(tokens, 1.0)
        else:
            log_ratio = log_ratios(logprob, old_logprob, base, t, valid)
        pos, neg, every = load_weights(
            advantages, weight_pos, weight_neg, weight_all, base, t, row, valid, token_share, BY_TOKEN
        )
        gain, grad, ratio, clipped_low, clipped_high = policy_term(
            log_ratio, pos, neg, low, high, dual_cap, tau_pos, tau_neg, max_log_ratio, CLIP
        )
        sums = evaluate_tokens(
            sums, base, t, inside, valid, gain, grad, ratio, clipped_low, clipped_high, every,
            logprob, old_logprob, ref_logprob, rollout_logprob, entropy, grad_logprob, grad_entropy, value,
            max_log_ratio, importance_cap, kl_coef, entropy_coef, CLIP, KL,
        )  # fmt: skip
    # 4. their sums
    store_sums(sums, turns, tokens, partial, row, columns)
