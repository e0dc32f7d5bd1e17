"""Parts of the kernels of `tree_attention`: the rows of a program, and loads of blocks of tokens."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

ANY_VALUE = ["tokens", "num_keys"]
"""Numbers for which no kernel is compiled again."""
BY_QUERY = ["peaks", "log_total", "delta"]
"""Vectors over queries, (Hq, T): those of a head begin at any multiple of T."""


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
