"""Forward kernel of `tree_attention`, and what it shares with the backward.

A program owns a block of queries of one key head. The rows of its tile are pairs (query, head of the group), so that
the keys and values of a block are loaded once for all query heads that read them. Weights are powers of 2: with
c = scale / ln 2, weight = 2^((score - peak) c - log_total), score being the plain product of query and key. The peak is
kept apart from log_total because a difference of near scores is exact; their rounded sum would not be.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

MASKED = tl.constexpr(-1e30)  # the score of a key that is not visible: finite, so that no difference is NaN


@triton.jit
def load_ends(key_ends, key, num_keys):
    """Where the subtrees of keys end, counted as queries; 0, so that no query sees them, behind the last key."""
    return tl.load(key_ends + key, mask=key < num_keys, other=0)


@triton.jit
def visible(query, key, end):
    """Whether a query sees a key whose subtree ends at `end`; all count as queries, and so a prefix lies below 0."""
    return (key <= query) & (query < end)


@triton.jit
def program_rows(query_order, tokens, DEPTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The rows (query, head of the group) of this program: number and first query of their block, head; of every row
    its number, its query and whether it is live; columns."""
    QUERIES: tl.constexpr = ROWS // GROUP
    query_block = tl.load(query_order + tl.program_id(0))
    first = query_block * QUERIES
    row = tl.arange(0, ROWS)
    query = first + row // GROUP
    live = (row < QUERIES * GROUP) & (query < tokens)
    return query_block, first, tl.program_id(1), row, query, live, tl.arange(0, DEPTH)


@triton.jit
def row_pointers(base, first, head, row, column, stride, head_stride, GROUP: tl.constexpr):
    """(ROWS, DEPTH) pointers to the rows (query, head of the group) of the queries from `first` on."""
    row_head = head * GROUP + row % GROUP
    offset = (first + row // GROUP).to(tl.int64) * stride + row_head.to(tl.int64) * head_stride
    return base + offset[:, None] + column[None, :]


@triton.jit
def load_tile(pointer, live, column, ALL_LIVE: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """(rows, DEPTH) from (rows, DEPTH) pointers; zeros in rows that are not live and in columns from WIDTH on."""
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
    """(SIZE, DEPTH) of the tokens of one block and one head; zeros behind the last token unless ALL_LIVE."""
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


@triton.jit(do_not_specialize=["tokens", "num_keys"])
def _forward_kernel(
    q, k, v, key_ends, out, peaks, log_total, query_order, full_offsets, full, partial_offsets, partial, tokens,
    num_keys, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, c,
    DESCRIPTORS: tl.constexpr, PARTIAL_STAGES: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Output (T, Hq, d), peak and log_total (Hq, T) of one block of queries and one key head."""
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
