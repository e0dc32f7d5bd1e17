"""Triton kernels of `tree_attention`, forward and backward.

Forward. A program owns a block of queries of one key head. The rows of its tile are pairs (query, head of the group),
so that the keys and values of a block are loaded once for all query heads that read them. Weights are powers of 2:

    c = scale / ln 2        score = q . k        weight = 2^((score - peak) c - log_total)

The peak is kept apart from log_total because a difference of near scores is exact; their rounded sum would not be.

Backward. The weights are computed again from these statistics. With P the weights, O = P V and dO the upstream
gradient: dV = P^T dO, dP = dO V^T, and through the softmax

    dS = P * (dP - delta)        delta = rowsum(P * dP) = rowsum(dO * O)        dQ = scale dS K        dK = scale dS^T Q

One kernel runs over blocks of queries for dQ, and writes delta; the other then runs over blocks of keys for dK and dV,
and through all heads of the group, so that keys and values are loaded once. There are no atomics: bits repeat.

What to expect, by arithmetic; nothing here has been measured. For P pairs of a query and a key that it sees, and Hq
query heads of d dimensions: 4 P Hq d FLOPs forward (two products), and 14 P Hq d backward (seven: both kernels compute
scores and dP, so that neither needs atomics; a single kernel would need five). A tree of 32k tokens whose paths average
4k tokens has P = 1.3e8; with Hq = 32, d = 128: 2.1 and 7.5 TFLOP a layer, 20 ms at 500 TFLOP/s. Memory traffic is q, k,
v, the output and their gradients once, some tens to hundreds of MB: under 1 ms. So the matrix units bound it. What is
lost beyond P is masked work: about half a block at either end of a run of visible tokens, with blocks of 64 keys 3-6 %
at turns of several hundred tokens. A tile of 128 rows reads a byte of keys and values from the L2 cache every 128
FLOPs; the programs of one head run side by side, so that its keys and values (16 MB at 32k tokens) stay there.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

_ANY_VALUE = ["tokens", "num_keys"]
# Vectors over queries, (Hq, T): those of a head begin at any multiple of T.
_BY_QUERY = ["peaks", "log_total", "delta"]
MASKED = tl.constexpr(-1e30)  # the score of a key that is not visible: finite, so that no difference is NaN


@triton.jit
def load_ends(key_ends, key, num_keys):
    """Load where the subtrees of keys end, counted as queries; 0 behind the last key, so that no query sees those."""
    return tl.load(key_ends + key, mask=key < num_keys, other=0)


@triton.jit
def visible(query, key, end):
    """Say whether a query sees a key whose subtree ends at `end`; all count as queries, so a prefix lies below 0."""
    return (key <= query) & (query < end)


@triton.jit
def program_rows(query_order, tokens, DEPTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Find the rows (query, head of the group) of this program: number and first query of their block, and their key
    head; number of every row, its query, and whether it is live; columns."""
    QUERIES: tl.constexpr = ROWS // GROUP
    query_block = tl.load(query_order + tl.program_id(0))
    first = query_block * QUERIES
    row = tl.arange(0, ROWS)
    query = first + row // GROUP
    live = (row < QUERIES * GROUP) & (query < tokens)
    return query_block, first, tl.program_id(1), row, query, live, tl.arange(0, DEPTH)


@triton.jit
def row_pointers(base, first, head, row, column, stride, head_stride, GROUP: tl.constexpr):
    """Point to (ROWS, DEPTH): the rows (query, head of the group) of the queries from `first` on."""
    row_head = head * GROUP + row % GROUP
    offset = (first + row // GROUP).to(tl.int64) * stride + row_head.to(tl.int64) * head_stride
    return base + offset[:, None] + column[None, :]


@triton.jit
def load_tile(pointer, live, column, ALL_LIVE: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """Load (rows, DEPTH) from as many pointers; zeros in rows that are not live and in columns from WIDTH on."""
    if ALL_LIVE and WIDTH == DEPTH:
        return tl.load(pointer)
    elif ALL_LIVE:
        return tl.load(pointer, mask=(column < WIDTH)[None, :], other=0.0)
    elif WIDTH == DEPTH:
        return tl.load(pointer, mask=live[:, None], other=0.0)
    else:
        return tl.load(pointer, mask=live[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def load_block(
    source, block, head, tokens, stride, head_stride,
    DESCRIPTORS: tl.constexpr, ALL_LIVE: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Load the (SIZE, DEPTH) tokens of one block and one head; zeros behind the last token unless ALL_LIVE."""
    if DESCRIPTORS:
        return source.load([block * SIZE, head, 0]).reshape(SIZE, DEPTH)
    else:
        token = block * SIZE + tl.arange(0, SIZE)
        column = tl.arange(0, DEPTH)
        pointer = row_pointers(source, block * SIZE, head, tl.arange(0, SIZE), column, stride, head_stride, 1)
        return load_tile(pointer, token < tokens, column, ALL_LIVE, WIDTH, DEPTH)


@triton.jit
def _add_block(
    acc, total, peak, q, k, v, block, head, query, key_ends, num_keys, prefix,
    k_stride, k_head_stride, v_stride, v_head_stride, c,
    PARTIAL: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to the running sums, which are relative to the running peak of the scores."""
    keys = load_block(k, block, head, num_keys, k_stride, k_head_stride, DESCRIPTORS, not PARTIAL, KEYS, WIDTH, DEPTH)
    scores = tl.dot(q, keys.T, input_precision="ieee")
    if PARTIAL:
        key = block * KEYS + tl.arange(0, KEYS)
        end = load_ends(key_ends, key, num_keys)
        key -= prefix
        scores = tl.where(visible(query[:, None], key[None, :], end[None, :]), scores, MASKED)
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


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_BY_QUERY)
def _forward_kernel(
    q, k, v, key_ends, out, peaks, log_total, query_order, full_offsets, full, partial_offsets, partial, tokens,
    num_keys, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, c,
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
    total = tl.zeros((ROWS,), tl.float32)
    peak = tl.full((ROWS,), MASKED, tl.float32)
    for i in tl.range(tl.load(full_offsets + query_block), tl.load(full_offsets + query_block + 1)):
        acc, total, peak = _add_block(
            acc, total, peak, queries, k, v, tl.load(full + i), head, query, key_ends, num_keys, prefix,
            k_stride, k_head_stride, v_stride, v_head_stride, c, False, DESCRIPTORS, WIDTH, DEPTH, KEYS,
        )  # fmt: skip
    lo, hi = tl.load(partial_offsets + query_block), tl.load(partial_offsets + query_block + 1)
    for i in tl.range(lo, hi, num_stages=PARTIAL_STAGES):
        acc, total, peak = _add_block(
            acc, total, peak, queries, k, v, tl.load(partial + i), head, query, key_ends, num_keys, prefix,
            k_stride, k_head_stride, v_stride, v_head_stride, c, True, DESCRIPTORS, WIDTH, DEPTH, KEYS,
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


@triton.jit
def _add_key_block(
    dq, q, do, peak, log_total, delta, k, v, block, head, query, key_ends, num_keys, prefix,
    k_stride, k_head_stride, v_stride, v_head_stride, c,
    PARTIAL: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Add dQ, before the scale, through one block of keys."""
    keys = load_block(k, block, head, num_keys, k_stride, k_head_stride, DESCRIPTORS, not PARTIAL, KEYS, WIDTH, DEPTH)
    values = load_block(v, block, head, num_keys, v_stride, v_head_stride, DESCRIPTORS, not PARTIAL, KEYS, WIDTH, DEPTH)
    scores = tl.dot(q, keys.T, input_precision="ieee") - peak[:, None]
    if PARTIAL:
        key = block * KEYS + tl.arange(0, KEYS)
        end = load_ends(key_ends, key, num_keys)
        key -= prefix
        scores = tl.where(visible(query[:, None], key[None, :], end[None, :]), scores, MASKED)
    weights = tl.exp2(scores * c - log_total[:, None])
    dp = tl.dot(do, values.T, input_precision="ieee")
    ds = weights * (dp - delta[:, None])
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_BY_QUERY)
def _query_gradient_kernel(
    q, k, v, key_ends, out, do, peaks, log_total, delta, dq,
    query_order, full_offsets, full, partial_offsets, partial, tokens, num_keys,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, do_stride, do_head_stride,
    dq_stride, dq_head_stride, c, scale,
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
            acc, queries, upstream, peak, total, mean, k, v, tl.load(full + i), head, query, key_ends, num_keys,
            prefix, k_stride, k_head_stride, v_stride, v_head_stride, c, False, DESCRIPTORS, WIDTH, DEPTH, KEYS,
        )  # fmt: skip
    lo, hi = tl.load(partial_offsets + query_block), tl.load(partial_offsets + query_block + 1)
    for i in tl.range(lo, hi, num_stages=PARTIAL_STAGES):
        acc = _add_key_block(
            acc, queries, upstream, peak, total, mean, k, v, tl.load(partial + i), head, query, key_ends, num_keys,
            prefix, k_stride, k_head_stride, v_stride, v_head_stride, c, True, DESCRIPTORS, WIDTH, DEPTH, KEYS,
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
def _add_query_block(
    dk, dv, keys, values, q, do, peaks, log_total, delta, block, head, key, end, tokens,
    q_stride, q_head_stride, do_stride, do_head_stride, c,
    PARTIAL: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add dK, before the scale, and dV through one block of queries of one query head.

    Scores and weights are transposed, (KEYS, ROWS). What is subtracted from a product is where its sum starts, which
    saves registers. Rows behind the last token have q = do = 0 and so add nothing.
    """
    query = block * ROWS + tl.arange(0, ROWS)
    zeros = tl.zeros((keys.shape[0], ROWS), tl.float32)
    rows = load_block(q, block, head, tokens, q_stride, q_head_stride, DESCRIPTORS, not PARTIAL, ROWS, WIDTH, DEPTH)
    peak = _load_statistic(peaks, head, query, tokens, not PARTIAL)
    scores = tl.dot(keys, rows.T, zeros - peak[None, :], input_precision="ieee")
    if PARTIAL:
        scores = tl.where(visible(query[None, :], key[:, None], end[:, None]), scores, MASKED)
    total = _load_statistic(log_total, head, query, tokens, not PARTIAL)
    weights = tl.exp2(scores * c - total[None, :])
    up = load_block(do, block, head, tokens, do_stride, do_head_stride, DESCRIPTORS, not PARTIAL, ROWS, WIDTH, DEPTH)
    dv = tl.dot(weights.to(up.dtype), up, dv, input_precision="ieee")
    mean = _load_statistic(delta, head, query, tokens, not PARTIAL)
    ds = weights * tl.dot(values, up.T, zeros - mean[None, :], input_precision="ieee")
    dk = tl.dot(ds.to(rows.dtype), rows, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_BY_QUERY)
def _key_gradient_kernel(
    q, k, v, key_ends, do, peaks, log_total, delta, dk, dv, dk_parts, dv_parts, key_parts, tokens, num_keys,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, do_stride, do_head_stride,
    dk_stride, dk_head_stride, dv_stride, dv_head_stride, c, scale,
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
            dk_sum, dv_sum, keys, values, q, do, peaks, log_total, delta, i // GROUP, head * GROUP + i % GROUP,
            None, None, tokens, q_stride, q_head_stride, do_stride, do_head_stride, c,
            False, DESCRIPTORS, WIDTH, DEPTH, ROWS,
        )  # fmt: skip
    key = key_block * KEYS + at
    end = load_ends(key_ends, key, num_keys)
    key -= num_keys - tokens
    full = full_hi - full_lo
    for i in tl.range(lo * GROUP, (hi - full) * GROUP, num_stages=PARTIAL_STAGES):
        block = i // GROUP
        block = tl.where(block < full_lo, block, block + full)
        dk_sum, dv_sum = _add_query_block(
            dk_sum, dv_sum, keys, values, q, do, peaks, log_total, delta, block, head * GROUP + i % GROUP,
            key, end, tokens, q_stride, q_head_stride, do_stride, do_head_stride, c,
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


@triton.jit(do_not_specialize=_ANY_VALUE)
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
