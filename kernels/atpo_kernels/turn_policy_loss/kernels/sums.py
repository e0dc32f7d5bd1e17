"""Shared by the kernels of both layouts: the loss of a block of tokens, the sums over it, and their last reduction.

A program (of a turn or of a row) leaves one column of partial sums; `_finish_kernel` adds up the columns in order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from atpo_kernels.turn_policy_loss.kernels.terms import approximate_kl, clamp_min, token_terms

# Rows of the partial sums. The first are sums over tokens, all but LOSS over the counted ones (W0 > 0).
LOSS, CLIPPED_LOW, CLIPPED_HIGH, APPROX_KL, RATIO, ENTROPY, REF_KL, TOKENS = (tl.constexpr(i) for i in range(8))
RATIO_MAX, TURNS, UNITS = (tl.constexpr(i) for i in range(8, 11))
ROWS = tl.constexpr(11)
PADDED_ROWS = tl.constexpr(16)  # the next power of 2
METRICS = {
    "clipped_low": CLIPPED_LOW, "clipped_high": CLIPPED_HIGH, "approx_kl": APPROX_KL, "ratio_mean": RATIO,
    "ratio_max": RATIO_MAX, "turns": TURNS, "tokens": TOKENS, "entropy": ENTROPY, "ref_kl": REF_KL,
}  # fmt: skip


@triton.jit
def load(pointer, base, t, valid):
    """Load elements base + t in float32, 0 where not valid, whatever lies there."""
    return tl.load(pointer + base + t, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def is_valid(mask, base, t, inside):
    """Say which tokens count: those inside, where the mask (None: everywhere) is not 0."""
    valid = inside
    if mask is not None:
        valid = inside & (tl.load(mask + base + t, mask=inside, other=0) != 0)
    return valid


@triton.jit
def log_ratios(logprob, old_logprob, base, t, valid):
    """Compute logprob - old_logprob; 0 where old_logprob is None, which means the current one."""
    current = load(logprob, base, t, valid)
    old = current
    if old_logprob is not None:
        old = load(old_logprob, base, t, valid)
    return current - old


@triton.jit
def load_weights(
    advantages, weight_pos, weight_neg, weight_all, base, t, owner, valid, share, BY_TOKEN: tl.constexpr
):  # fmt: skip
    """Load W+, W-, W0 of a block of tokens, from weights or from advantages of tokens or of their owner (turn, row)."""
    if advantages is None:
        pos, neg = load(weight_pos, base, t, valid), load(weight_neg, base, t, valid)
        every = load(weight_all, base, t, valid)
    else:
        every = tl.where(valid, share, 0.0)
        if BY_TOKEN:
            advantage = load(advantages, base, t, valid)
        else:
            advantage = tl.where(valid, tl.load(advantages + owner).to(tl.float32), 0.0)
        pos, neg = every * clamp_min(advantage, 0.0), every * clamp_min(-advantage, 0.0)
    return pos, neg, every


@triton.jit
def no_sums():
    """Begin with sums over no tokens: rows LOSS to TOKENS, and RATIO_MAX."""
    zero = tl.full((), 0.0, tl.float32)
    return (zero, zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def evaluate_tokens(
    sums, base, t, inside, valid, gain, grad, ratio, clipped_low, clipped_high, every,
    logprob, old_logprob, ref_logprob, rollout_logprob, entropy, grad_logprob, grad_entropy, value,
    max_log_ratio, importance_cap, kl_coef, entropy_coef, CLIP: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """Store derivatives (and the loss by token) of a block of tokens with this policy term; add the block to `sums`."""
    # 1. inputs; None where the loss does not read them
    current = load(logprob, base, t, valid)
    old = current
    if old_logprob is not None:
        old = load(old_logprob, base, t, valid)
    ref = None
    if ref_logprob is not None:
        ref = load(ref_logprob, base, t, valid)
    rollout = None
    if rollout_logprob is not None:
        rollout = load(rollout_logprob, base, t, valid)
    token_entropy = tl.zeros_like(current)
    if entropy is not None:
        token_entropy = load(entropy, base, t, valid)
    rewarded = None
    if grad_entropy is not None:
        rewarded = token_entropy
    # 2. value and derivatives
    loss, by_logprob, by_entropy, kl = token_terms(
        gain, grad, current, old, ref, rollout, rewarded, every, importance_cap, kl_coef, entropy_coef, CLIP, KL
    )  # fmt: skip
    loss = tl.where(valid, loss, 0.0)
    tl.store(grad_logprob + base + t, tl.where(valid, by_logprob, 0.0), mask=inside)
    if grad_entropy is not None:
        tl.store(grad_entropy + base + t, by_entropy, mask=inside)
    if value is not None:
        tl.store(value + base + t, loss, mask=inside)
    # 3. sums, in the order of the rows
    counted = every > 0
    ratio = tl.where(counted, ratio, 0.0)
    return (
        sums[0] + tl.sum(loss, 0),
        sums[1] + tl.sum(tl.where(counted, clipped_low, 0.0), 0),
        sums[2] + tl.sum(tl.where(counted, clipped_high, 0.0), 0),
        sums[3] + tl.sum(tl.where(counted, approximate_kl(current - old, max_log_ratio), 0.0), 0),
        sums[4] + tl.sum(ratio, 0),
        sums[5] + tl.sum(tl.where(counted, token_entropy, 0.0), 0),
        sums[6] + tl.sum(tl.where(counted, kl, 0.0), 0),
        sums[7] + tl.sum(tl.where(counted, 1.0, 0.0), 0),
        tl.maximum(sums[8], tl.max(ratio, 0)),
    )


@triton.jit
def store_sums(sums, turns, units, partial, column, columns):
    """Write one column of the partial sums (ROWS, columns)."""
    for i in tl.static_range(TOKENS + 1):
        tl.store(partial + i * columns + column, sums[i])
    tl.store(partial + RATIO_MAX * columns + column, sums[RATIO_MAX])
    tl.store(partial + TURNS * columns + column, turns)
    tl.store(partial + UNITS * columns + column, units)


@triton.jit
def written_columns(turn_offsets, column, columns):
    """Say which columns of the partial sums there are; turns without tokens may have left theirs unwritten."""
    inside = column < columns
    if turn_offsets is not None:
        end = tl.load(turn_offsets + column + 1, mask=inside, other=0)
        inside = inside & (tl.load(turn_offsets + column, mask=inside, other=0) < end)
    return inside


@triton.jit(do_not_specialize=["columns", "tokens"], do_not_specialize_on_alignment=["turn_offsets"])
def _finish_kernel(
    partial, turn_offsets, result, grad_logprob, grad_entropy, columns, tokens,
    PER_UNIT: tl.constexpr, BLOCK: tl.constexpr, TOKENS_BLOCK: tl.constexpr,
):  # fmt: skip
    """Make loss and metrics of the partial sums, in program 0. PER_UNIT: divide loss and derivatives by the units.

    The units (tokens or turns of the whole batch) are not known before every column is, so each program adds them up
    and divides its own block of the derivatives.
    """
    program = tl.program_id(0)
    share = 1.0
    if PER_UNIT:
        # 1. the derivatives
        count = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = written_columns(turn_offsets, column, columns)
            count += tl.load(partial + UNITS * columns + column, mask=inside, other=0.0)
        share = 1 / clamp_min(tl.sum(count, 0), 1.0)
        at = program.to(tl.int64) * TOKENS_BLOCK + tl.arange(0, TOKENS_BLOCK)
        tl.store(grad_logprob + at, tl.load(grad_logprob + at, mask=at < tokens) * share, mask=at < tokens)
        if grad_entropy is not None:
            tl.store(grad_entropy + at, tl.load(grad_entropy + at, mask=at < tokens) * share, mask=at < tokens)
    if program == 0:
        # 2. every row of the partial sums
        row = tl.arange(0, PADDED_ROWS)
        total = tl.zeros((PADDED_ROWS, BLOCK), tl.float32)
        peak = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = written_columns(turn_offsets, column, columns)
            place = row[:, None] * columns + column[None, :]
            total += tl.load(partial + place, mask=(row < ROWS)[:, None] & inside[None, :], other=0.0)
            peak = tl.maximum(peak, tl.load(partial + RATIO_MAX * columns + column, mask=inside, other=0.0))
        # 3. sums to means
        values = tl.sum(total, 1)
        counted = tl.sum(tl.where(row == TOKENS, values, 0.0), 0)
        values = tl.where((row > LOSS) & (row < TOKENS), values / clamp_min(counted, 1.0), values)
        values = tl.where(row == LOSS, values * share, values)
        values = tl.where(row == RATIO_MAX, tl.max(peak, 0), values)
        tl.store(result + row, values)
