"""Kernels of the backward of `tree_attention`: gradients of queries, of keys and values, and of sinks."""

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
from atpo_kernels.tree_attention.kernels.scores import hide, load_ends, score


@triton.jit
def _add_key_block(
    dq, q, do, peak, log_total, delta, k, v, block, head, query, first_key, key_ends, num_keys, prefix,
    k_stride, k_head_stride, v_stride, v_head_stride, c, factor,
    PARTIAL: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Add dQ, before the scale, through one block of keys."""
    keys = load_block(k, block, head, num_keys, k_stride, k_head_stride, DESCRIPTORS, not PARTIAL, KEYS, WIDTH, DEPTH)
    values = load_block(v, block, head, num_keys, v_stride, v_head_stride, DESCRIPTORS, not PARTIAL, KEYS, WIDTH, DEPTH)
    capped = score(tl.dot(q, keys.T, input_precision="ieee"), factor)
    scores = capped - peak[:, None]
    if PARTIAL:
        key = block * KEYS + tl.arange(0, KEYS)
        end = load_ends(key_ends, key, num_keys)
        scores = hide(scores, query, key - prefix, end, first_key, 0)
    weights = tl.exp2(scores * c - log_total[:, None])
    if factor is not None:
        weights *= 1.0 - capped * capped
    dp = tl.dot(do, values.T, input_precision="ieee")
    ds = weights * (dp - delta[:, None])
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=BY_QUERY)
def _query_gradient_kernel(
    q, k, v, key_ends, out, do, peaks, log_total, delta, dq,
    query_order, full_offsets, full, partial_offsets, partial, first_keys, tokens, num_keys,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, do_stride, do_head_stride,
    dq_stride, dq_head_stride, c, factor, scale,
    DESCRIPTORS: tl.constexpr, PARTIAL_STAGES: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Compute dQ and delta (Hq, T) of one block of queries and one key head."""
    # 1. the rows of this block
    query_block, first, head, row, query, live, column = program_rows(query_order, tokens, DEPTH, GROUP, ROWS)
    heads = tl.num_programs(1) * GROUP
    q_tile = row_pointers(q, first, head, row, column, q_stride, q_head_stride, GROUP)
    do_tile = row_pointers(do, first, head, row, column, do_stride, do_head_stride, GROUP)
    out_tile = row_pointers(out, first, head, row, column, heads * WIDTH, WIDTH, GROUP)
    queries = load_tile(q_tile, live, column, False, WIDTH, DEPTH)
    upstream = load_tile(do_tile, live, column, False, WIDTH, DEPTH)
    # 2. delta, for the other kernel as well
    result = load_tile(out_tile, live, column, False, WIDTH, DEPTH)
    mean = tl.sum(upstream.to(tl.float32) * result.to(tl.float32), 1)
    statistics = (head * GROUP + row % GROUP).to(tl.int64) * tokens + query
    tl.store(delta + statistics, mean, mask=live)
    peak = tl.load(peaks + statistics, mask=live, other=0.0)
    total = tl.load(log_total + statistics, mask=live, other=0.0)
    # 3. sum over the key blocks
    prefix = num_keys - tokens
    acc = tl.zeros((ROWS, DEPTH), tl.float32)
    for i in tl.range(tl.load(full_offsets + query_block), tl.load(full_offsets + query_block + 1)):
        acc = _add_key_block(
            acc, queries, upstream, peak, total, mean, k, v, tl.load(full + i), head, query, None, key_ends, num_keys,
            prefix, k_stride, k_head_stride, v_stride, v_head_stride, c, factor, False, DESCRIPTORS, WIDTH, DEPTH, KEYS,
        )  # fmt: skip
    first_key = None if first_keys is None else tl.load(first_keys + query, mask=live, other=0)
    lo, hi = tl.load(partial_offsets + query_block), tl.load(partial_offsets + query_block + 1)
    for i in tl.range(lo, hi, num_stages=PARTIAL_STAGES):
        acc = _add_key_block(
            acc, queries, upstream, peak, total, mean, k, v, tl.load(partial + i), head, query, first_key, key_ends,
            num_keys, prefix, k_stride, k_head_stride, v_stride, v_head_stride, c, factor, True, DESCRIPTORS, WIDTH,
            DEPTH, KEYS,
        )  # fmt: skip
    # 4. the gradient
    dq_tile = row_pointers(dq, first, head, row, column, dq_stride, dq_head_stride, GROUP)
    tl.store(dq_tile, (acc * scale).to(dq.dtype.element_ty), mask=live[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _load_statistic(source, head, query, tokens, ALL_LIVE: tl.constexpr):
    """Load a statistic of queries of one head; 0 behind the last token."""
    pointer = source + head.to(tl.int64) * tokens + query
    if ALL_LIVE:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=query < tokens, other=0.0)


@triton.jit
def query_block_at(query_blocks, place):
    """Find the query block at a place of those that see a block of keys: they are a range, or with windows a list."""
    return place if query_blocks is None else tl.load(query_blocks + place)


@triton.jit
def _add_query_block(
    dk, dv, keys, values, q, do, peaks, log_total, delta, block, head, key, end, first_keys, tokens,
    q_stride, q_head_stride, do_stride, do_head_stride, c, factor,
    PARTIAL: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add dK, before the scale, and dV through one block of queries of one query head.

    Scores and weights are transposed, (KEYS, ROWS). What is subtracted from a product is where its sum starts, which
    saves registers, but where a cap comes between. Rows behind the last token have q = do = 0 and so add nothing.
    """
    query = block * ROWS + tl.arange(0, ROWS)
    zeros = tl.zeros((keys.shape[0], ROWS), tl.float32)
    rows = load_block(q, block, head, tokens, q_stride, q_head_stride, DESCRIPTORS, not PARTIAL, ROWS, WIDTH, DEPTH)
    if factor is None:
        peak = _load_statistic(peaks, head, query, tokens, not PARTIAL)
        scores = tl.dot(keys, rows.T, zeros - peak[None, :], input_precision="ieee")
    else:
        capped = score(tl.dot(keys, rows.T, input_precision="ieee"), factor)
        scores = capped - _load_statistic(peaks, head, query, tokens, not PARTIAL)[None, :]
    if PARTIAL:
        first_key = None if first_keys is None else tl.load(first_keys + query, mask=query < tokens, other=0)
        scores = hide(scores, query, key, end, first_key, 1)
    total = _load_statistic(log_total, head, query, tokens, not PARTIAL)
    weights = tl.exp2(scores * c - total[None, :])
    up = load_block(do, block, head, tokens, do_stride, do_head_stride, DESCRIPTORS, not PARTIAL, ROWS, WIDTH, DEPTH)
    stored = weights.to(up.dtype)
    if factor is not None:
        weights *= 1.0 - capped * capped
    dv = tl.dot(stored, up, dv, input_precision="ieee")
    mean = _load_statistic(delta, head, query, tokens, not PARTIAL)
    ds = weights * tl.dot(values, up.T, zeros - mean[None, :], input_precision="ieee")
    dk = tl.dot(ds.to(rows.dtype), rows, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=BY_QUERY)
def _key_gradient_kernel(
    q, k, v, key_ends, do, peaks, log_total, delta, dk, dv, dk_parts, dv_parts, key_parts, query_blocks, first_keys,
    tokens, num_keys, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, do_stride,
    do_head_stride, dk_stride, dk_head_stride, dv_stride, dv_head_stride, c, factor, scale,
    DESCRIPTORS: tl.constexpr, PARTIAL_STAGES: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Compute dK and dV of one block of keys and one key head, or for a piece of its queries the sums in float32."""
    # 1. this program's piece of work
    part = key_parts + tl.program_id(0) * 6
    key_block = tl.load(part)
    lo, full_lo, full_hi, hi = tl.load(part + 1), tl.load(part + 2), tl.load(part + 3), tl.load(part + 4)
    head = tl.program_id(1)
    at = tl.arange(0, KEYS)
    keys = load_block(k, key_block, head, num_keys, k_stride, k_head_stride, False, False, KEYS, WIDTH, DEPTH)
    values = load_block(v, key_block, head, num_keys, v_stride, v_head_stride, False, False, KEYS, WIDTH, DEPTH)
    # 2. sums over the query blocks: first those that see all keys, then those before and behind them
    dk_sum = tl.zeros((KEYS, DEPTH), tl.float32)
    dv_sum = tl.zeros((KEYS, DEPTH), tl.float32)
    for i in tl.range(full_lo * GROUP, full_hi * GROUP):
        dk_sum, dv_sum = _add_query_block(
            dk_sum, dv_sum, keys, values, q, do, peaks, log_total, delta, query_block_at(query_blocks, i // GROUP),
            head * GROUP + i % GROUP, None, None, None, tokens, q_stride, q_head_stride, do_stride, do_head_stride, c,
            factor,
            False, DESCRIPTORS, WIDTH, DEPTH, ROWS,
        )  # fmt: skip
    key = key_block * KEYS + at
    end = load_ends(key_ends, key, num_keys)
    key -= num_keys - tokens
    full = full_hi - full_lo
    for i in tl.range(lo * GROUP, (hi - full) * GROUP, num_stages=PARTIAL_STAGES):
        block = i // GROUP
        block = query_block_at(query_blocks, tl.where(block < full_lo, block, block + full))
        dk_sum, dv_sum = _add_query_block(
            dk_sum, dv_sum, keys, values, q, do, peaks, log_total, delta, block, head * GROUP + i % GROUP,
            key, end, first_keys, tokens, q_stride, q_head_stride, do_stride, do_head_stride, c, factor,
            True, DESCRIPTORS, WIDTH, DEPTH, ROWS,
        )  # fmt: skip
    # 3. results, or partial sums in their slot
    column = tl.arange(0, DEPTH)
    slot = tl.load(part + 5)  # only now: the loops above have no register to spare
    if slot >= 0:
        place = (slot * tl.num_programs(1) + head).to(tl.int64) * KEYS * DEPTH
        offset = place + at[:, None] * DEPTH + column[None, :]
        tl.store(dk_parts + offset, dk_sum)
        tl.store(dv_parts + offset, dv_sum)
    else:
        inside = (key < tokens)[:, None] & (column < WIDTH)[None, :]
        dk_tile = row_pointers(dk, key_block * KEYS, head, at, column, dk_stride, dk_head_stride, 1)
        dv_tile = row_pointers(dv, key_block * KEYS, head, at, column, dv_stride, dv_head_stride, 1)
        tl.store(dk_tile, (dk_sum * scale).to(dk.dtype.element_ty), mask=inside)
        tl.store(dv_tile, dv_sum.to(dv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=ANY_VALUE)
def _key_sum_kernel(
    dk, dv, dk_parts, dv_parts, split_keys, num_keys, dk_stride, dk_head_stride, dv_stride, dv_head_stride, scale,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, KEYS: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Add up dK and dV of SUMMED keys of a block that several programs worked on: its slots, in order."""
    split = split_keys + tl.program_id(0) * 3
    key_block, first_slot, last_slot = tl.load(split), tl.load(split + 1), tl.load(split + 2)
    head = tl.program_id(1)
    at = tl.program_id(2) * SUMMED + tl.arange(0, SUMMED)
    column = tl.arange(0, DEPTH)
    offset = at[:, None] * DEPTH + column[None, :]
    dk_sum = tl.zeros((SUMMED, DEPTH), tl.float32)
    dv_sum = tl.zeros((SUMMED, DEPTH), tl.float32)
    for slot in tl.range(first_slot, last_slot):
        place = (slot * tl.num_programs(1) + head).to(tl.int64) * KEYS * DEPTH
        dk_sum += tl.load(dk_parts + place + offset)
        dv_sum += tl.load(dv_parts + place + offset)
    inside = (key_block * KEYS + at < num_keys)[:, None] & (column < WIDTH)[None, :]
    dk_tile = row_pointers(dk, key_block * KEYS, head, at, column, dk_stride, dk_head_stride, 1)
    dv_tile = row_pointers(dv, key_block * KEYS, head, at, column, dv_stride, dv_head_stride, 1)
    tl.store(dk_tile, (dk_sum * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv_tile, dv_sum.to(dv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=BY_QUERY)
def _sink_gradient_kernel(sinks, peaks, log_total, delta, dsinks, tokens, c, BLOCK: tl.constexpr):
    """Compute the gradient (Hq,) of the sink of one query head: its queries are added up in order."""
    head = tl.program_id(0)
    sink = tl.load(sinks + head)
    at = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, tokens, BLOCK):
        query = start + at
        live = query < tokens
        place = head.to(tl.int64) * tokens + query
        total = tl.load(log_total + place, mask=live, other=0.0)
        weight = tl.exp2((sink - tl.load(peaks + place, mask=live, other=0.0)) * c - total)
        acc += weight * tl.load(delta + place, mask=live, other=0.0)
    tl.store(dsinks + head, -tl.sum(acc, 0))
