"""Sums over packed turns, and level `sequence` on them: trajectories that share turns.

(1) a program per turn sums its log-ratios; (2) a program per trajectory averages them over its turns; (3) the program
of a turn adds up the policy terms of the trajectories through it, in their order. Nothing is added by atomics.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from atpo_kernels.turn_policy_loss.kernels.sums import is_valid, load, log_ratios
from atpo_kernels.turn_policy_loss.kernels.terms import clamp_min, policy_term

ENTRIES = tl.constexpr(32)  # of paths at a time


@triton.jit
def place_turn(turn_offsets, turn):
    """Find where a turn's tokens begin, and their number."""
    base = tl.load(turn_offsets + turn).to(tl.int64)
    return base, (tl.load(turn_offsets + turn + 1).to(tl.int64) - base).to(tl.int32)


@triton.jit
def sum_turn(logprob, old_logprob, mask, base, length, SUMMED: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the log-ratios of a turn (0 unless SUMMED), and count its tokens."""
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    size = length.to(tl.float32)
    if SUMMED or mask is not None:
        for start in range(0, length, BLOCK):
            t = start + tl.arange(0, BLOCK)
            valid = is_valid(mask, base, t, t < length)
            count += tl.where(valid, 1.0, 0.0)
            if SUMMED:
                total += log_ratios(logprob, old_logprob, base, t, valid)
        size = tl.sum(count, 0)
    return tl.sum(total, 0), size


_ANY_ALIGNMENT = ["logprob", "old_logprob", "mask", "turn_offsets", "leaf_offsets", "entry_turns", "turn_sums"]


@triton.jit(do_not_specialize=["turns"], do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _turn_sums_kernel(logprob, old_logprob, mask, turn_offsets, turn_sums, turns, BLOCK: tl.constexpr):
    """Write turn_sums (2, N): sum of the log-ratios and number of tokens of every turn."""
    turn = tl.program_id(0)
    base, length = place_turn(turn_offsets, turn)
    total, size = sum_turn(logprob, old_logprob, mask, base, length, True, BLOCK)
    tl.store(turn_sums + turn, total)
    tl.store(turn_sums + turns + turn, size)


@triton.jit(do_not_specialize=["turns"], do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _leaf_kernel(turn_sums, leaf_offsets, entry_turns, leaf_log_ratio, turns):
    """Write leaf_log_ratio (S,): log-ratio of a trajectory, averaged over the tokens of its turns."""
    leaf = tl.program_id(0)
    begin, end = tl.load(leaf_offsets + leaf), tl.load(leaf_offsets + leaf + 1)
    total = tl.zeros((ENTRIES,), tl.float32)
    count = tl.zeros((ENTRIES,), tl.float32)
    for start in range(begin, end, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        inside = entry < end
        turn = tl.load(entry_turns + entry, mask=inside, other=0)
        total += load(turn_sums, 0, turn, inside)
        count += load(turn_sums, turns, turn, inside)
    tl.store(leaf_log_ratio + leaf, tl.sum(total, 0) / clamp_min(tl.sum(count, 0), 1.0))


@triton.jit
def path_term(
    turn, entry_offsets, entries, entry_leaf, leaf_log_ratio, path_pos, path_neg,
    low, high, dual_cap, tau_pos, tau_neg, max_log_ratio, CLIP: tl.constexpr,
):  # fmt: skip
    """Add up the policy term of a turn over the trajectories through it; ratio and clipping are means over these."""
    begin, end = tl.load(entry_offsets + turn), tl.load(entry_offsets + turn + 1)
    zero = tl.zeros((ENTRIES,), tl.float32)
    gain, grad, ratio, clipped_low, clipped_high = zero, zero, zero, zero, zero
    for start in range(begin, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        inside = at < end
        entry = tl.load(entries + at, mask=inside, other=0)
        leaf = tl.load(entry_leaf + entry, mask=inside, other=0)
        log_ratio = load(leaf_log_ratio, 0, leaf, inside)
        pos, neg = load(path_pos, 0, entry, inside), load(path_neg, 0, entry, inside)
        term = policy_term(log_ratio, pos, neg, low, high, dual_cap, tau_pos, tau_neg, max_log_ratio, CLIP)
        gain += term[0]
        grad += term[1]
        ratio += tl.where(inside, term[2], 0.0)
        clipped_low += term[3]
        clipped_high += term[4]
    share = 1 / clamp_min((end - begin).to(tl.float32), 1.0)
    ratio, clipped_low, clipped_high = (
        tl.sum(ratio, 0) * share,
        tl.sum(clipped_low, 0) * share,
        tl.sum(clipped_high, 0) * share,
    )
    return tl.sum(gain, 0), tl.sum(grad, 0), ratio, clipped_low, clipped_high
