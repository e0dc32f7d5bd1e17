"""Kernel of the forward of `tree_attention`."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from atpo_kernels.tree_attention.kernels.blocks import (
    ANY_VALUE,
    BY_QUERY,
    load_block,
    load_tile,
    program_rows,
    row_pointers,
)
from atpo_kernels.tree_attention.kernels.scores import MASKED, hide, load_ends, score


@triton.jit
def _add_block(
    acc, total, peak, q, k, v, block, head, query, first_key, key_ends, num_keys, prefix,
    k_stride, k_head_stride, v_stride, v_head_stride, c, factor,
    PARTIAL: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to the running sums, which are relative to the running peak of the scores."""
    keys = load_block(k, block, head, num_keys, k_stride, k_head_stride, DESCRIPTORS, not PARTIAL, KEYS, WIDTH, DEPTH)
    scores = score(tl.dot(q, keys.T, input_precision="ieee"), factor)
    if PARTIAL:
        key = block * KEYS + tl.arange(0, KEYS)
        end = load_ends(key_ends, key, num_keys)
        scores = hide(scores, query, key - prefix, end, first_key, 0)
    risen = tl.maximum(peak, tl.max(scores, 1))
    shrink = tl.exp2((peak - risen) * c)
    peak = risen
    if PARTIAL:
        # a row that has seen no key yet: MASKED c - MASKED c in one fused operation would not be 0 exactly
        risen = tl.where(risen == MASKED, 0.0, risen)
    weights = tl.exp2(scores * c - (risen * c)[:, None])
    total = total * shrink + tl.sum(weights, 1)
    values = load_block(v, block, head, num_keys, v_stride, v_head_stride, DESCRIPTORS, not PARTIAL, KEYS, WIDTH, DEPTH)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, total, peak


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=BY_QUERY)
def _forward_kernel(
    q, k, v, key_ends, out, peaks, log_total, query_order, full_offsets, full, partial_offsets, partial, first_keys,
    sinks, tokens, num_keys, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, c, factor,
    DESCRIPTORS: tl.constexpr, PARTIAL_STAGES: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Compute output (T, Hq, d), peak and log_total (Hq, T) of one block of queries and one key head."""
    # 1. the rows of this block
    query_block, first, head, row, query, live, column = program_rows(query_order, tokens, DEPTH, GROUP, ROWS)
    q_tile = row_pointers(q, first, head, row, column, q_stride, q_head_stride, GROUP)
    queries = load_tile(q_tile, live, column, False, WIDTH, DEPTH)
    # 2. running sums over the key blocks: first those that all queries see, then the others
    prefix = num_keys - tokens
    acc = tl.zeros((ROWS, DEPTH), tl.float32)
    if sinks is None:
        total = tl.zeros((ROWS,), tl.float32)
        peak = tl.full((ROWS,), MASKED, tl.float32)
    else:
        total = tl.full((ROWS,), 1.0, tl.float32)
        peak = tl.load(sinks + head * GROUP + row % GROUP)
    for i in tl.range(tl.load(full_offsets + query_block), tl.load(full_offsets + query_block + 1)):
        acc, total, peak = _add_block(
            acc, total, peak, queries, k, v, tl.load(full + i), head, query, None, key_ends, num_keys, prefix,
            k_stride, k_head_stride, v_stride, v_head_stride, c, factor, False, DESCRIPTORS, WIDTH, DEPTH, KEYS,
        )  # fmt: skip
    first_key = None if first_keys is None else tl.load(first_keys + query, mask=live, other=0)
    lo, hi = tl.load(partial_offsets + query_block), tl.load(partial_offsets + query_block + 1)
    for i in tl.range(lo, hi, num_stages=PARTIAL_STAGES):
        acc, total, peak = _add_block(
            acc, total, peak, queries, k, v, tl.load(partial + i), head, query, first_key, key_ends, num_keys, prefix,
            k_stride, k_head_stride, v_stride, v_head_stride, c, factor, True, DESCRIPTORS, WIDTH, DEPTH, KEYS,
        )  # fmt: skip
    # 3. the results; statistics first, which then need no registers
    total = tl.where(live, total, 1.0)
    statistics = (head * GROUP + row % GROUP).to(tl.int64) * tokens + query
    tl.store(peaks + statistics, peak, mask=live)
    tl.store(log_total + statistics, tl.log2(total), mask=live)
    heads = tl.num_programs(1) * GROUP
    out_tile = row_pointers(out, first, head, row, column, heads * WIDTH, WIDTH, GROUP)
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out_tile, result, mask=live[:, None] & (column < WIDTH)[None, :])
