"""Triton kernels of the LM head: statistics of the softmax of `hidden @ weight.T`, and gradients by its logits.

A program owns a tile of rows and a range of the vocabulary; the logits of one tile exist in its registers at a time, as
the float32 accumulators of the product. Exponentials are powers of 2, and differences are taken before they are scaled:

    c = 1 / (temperature ln 2)        x = (logit - peak) c        log_total = log2 sum 2^x
    softmax p = 2^(x - log_total)     logprob = (x[target] - log_total) ln 2
    entropy = -sum p ln p = (log_total - sum x 2^x / sum 2^x) ln 2

With the upstream gradients g of the log-prob and h of the entropy, and T the temperature,

    d loss / d logit = (g (1[target] - p) - h p (ln p + entropy)) / T
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from math import log

import triton
import triton.language as tl

LN_2 = tl.constexpr(log(2))
MASKED = tl.constexpr(-1e30)  # the logit of a column beyond the vocabulary: finite, so that 0 * MASKED is 0
STORED_BITS = tl.constexpr(15)  # exponentials are stored times 2^15: float16 then has all its digits down to 2^-29
STORED_SCALE = tl.constexpr(2.0**STORED_BITS.value)
_ANY_VALUE = ["start", "rows", "splits", "tiles_per_split", "capacity"]
# Vectors over rows: read from a row that may be any, so that where they begin says nothing of how they can be read.
_BY_ROW = ["targets", "logprob", "entropy", "peak", "log_total", "grad_logprob", "grad_entropy", "references"]


@triton.jit
def _first_row_and_split(rows, splits, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Place this program: GROUP row tiles go side by side through all ranges of the vocabulary, then the next GROUP."""
    program = tl.program_id(0)
    first = (program // (GROUP * splits)) * GROUP
    size = tl.minimum(tl.cdiv(rows, ROWS) - first, GROUP)
    within = program % (GROUP * splits)
    return (first + within % size) * ROWS, within // size


@triton.jit
def _logits(
    hidden, weight, bias, first_row, first_column, row_end, vocab, width, hidden_stride, weight_stride,
    HAS_BIAS: tl.constexpr, DESCRIPTORS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute (ROWS, COLUMNS) float32 logits before the temperature; MASKED beyond the vocabulary, any past row_end."""
    column = tl.arange(0, COLUMNS)
    inside = first_column + column < vocab
    logits = tl.zeros((ROWS, COLUMNS), tl.float32)
    if DESCRIPTORS:
        for k in range(0, width, DEPTH):
            x, w = hidden.load([first_row, k]), weight.load([first_column, k])
            logits = tl.dot(x, w.T, logits, input_precision="ieee")
    else:
        step = tl.arange(0, DEPTH)
        row = tl.arange(0, ROWS)
        live = first_row + row < row_end
        x_pointer = hidden + first_row.to(tl.int64) * hidden_stride + row[:, None] * hidden_stride + step[None, :]
        w_pointer = weight + first_column.to(tl.int64) * weight_stride + column[None, :] * weight_stride + step[:, None]
        for k in range(0, width, DEPTH):
            x = tl.load(x_pointer + k, mask=live[:, None] & (step[None, :] < width - k), other=0.0)
            w = tl.load(w_pointer + k, mask=inside[None, :] & (step[:, None] < width - k), other=0.0)
            logits = tl.dot(x, w, logits, input_precision="ieee")
    if HAS_BIAS:
        logits += tl.load(bias + first_column + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return tl.where(inside[None, :], logits, MASKED)


@triton.jit
def _store(
    out, values, first_row, first_column, rows, stride,
    DESCRIPTORS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write a (ROWS, COLUMNS) tile into the scratch buffer, whose rows of `stride` are padded to whole vectors."""
    if DESCRIPTORS:
        out.store([first_row, first_column], values.to(out.dtype))
    else:
        row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        pointer = out + first_row.to(tl.int64) * stride + first_column + row[:, None] * stride + column[None, :]
        live = (first_row + row < rows)[:, None] & (first_column + column < stride)[None, :]
        tl.store(pointer, values.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_BY_ROW)
def _statistics_kernel(
    hidden, weight, bias, targets, partial, exponentials, references, start, rows, vocab, width,
    hidden_stride, weight_stride, stride, capacity, splits, tiles_per_split, scale,
    HAS_BIAS: tl.constexpr, STORED: tl.constexpr, DESCRIPTORS: tl.constexpr, FLATTEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute statistics of rows [start, start + rows) over one range of the vocabulary; STORED keeps the exponentials.

    With x = (logit - peak) c in base 2: partial = (peak, sum 2^x, sum x 2^x, logit of the target or MASKED). When the
    peak rises by d c, 2^x shrinks by 2^(-d c), and x by d c: sum x 2^x becomes 2^(-dc) (sum x 2^x - dc sum 2^x).
    """
    # 1. this program's rows and their targets
    first_row, split = _first_row_and_split(rows, splits, ROWS, GROUP)
    row = first_row + tl.arange(0, ROWS)
    live = row < rows
    target = tl.load(targets + start + row, mask=live, other=-1)
    peak = tl.full((ROWS,), MASKED, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    chosen = tl.full((ROWS,), MASKED, tl.float32)
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(vocab, COLUMNS))
    for tile in tl.range(first_tile, last_tile, flatten=FLATTEN):
        # 2. logits of one tile
        first_column = tile * COLUMNS
        logits = _logits(
            hidden, weight, bias, start + first_row, first_column, start + rows, vocab, width,
            hidden_stride, weight_stride, HAS_BIAS, DESCRIPTORS, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        # 3. the target's logit, straight from the accumulators
        column = first_column + tl.arange(0, COLUMNS)
        hit = column[None, :] == target[:, None]
        chosen = tl.maximum(chosen, tl.max(tl.where(hit, logits, MASKED), 1))
        # 4. running sums relative to the running peak
        risen = tl.maximum(peak, tl.max(logits, 1))
        fall = (peak - risen) * scale
        x = (logits - risen[:, None]) * scale
        exponential = tl.exp2(x)
        shrink = tl.exp2(fall)
        weighted = shrink * (weighted + total * fall) + tl.sum(exponential * x, 1)
        total = shrink * total + tl.sum(exponential, 1)
        peak = risen
        # 5. 2^x and the peak it is relative to, for the gradient
        if STORED:
            tl.store(references + tile * capacity + row, risen, mask=live)
            scaled = exponential * STORED_SCALE
            _store(exponentials, scaled, first_row, first_column, rows, stride, DESCRIPTORS, ROWS, COLUMNS)
    out = partial + (row.to(tl.int64) * splits + split) * 4
    tl.store(out, peak, mask=live)
    tl.store(out + 1, total, mask=live)
    tl.store(out + 2, weighted, mask=live)
    tl.store(out + 3, chosen, mask=live)


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_BY_ROW)
def _merge_kernel(
    partial, logprob, entropy, peak, log_total, start, rows, splits, scale,
    ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of rows over the ranges of the vocabulary; of these there are at most SPLITS."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS)
    live = row < rows
    inside = live[:, None] & (split < splits)[None, :]
    source = partial + (row.to(tl.int64)[:, None] * splits + split[None, :]) * 4
    peaks = tl.load(source, mask=inside, other=MASKED)
    top = tl.max(peaks, 1)
    fall = (peaks - top[:, None]) * scale
    shrink = tl.exp2(fall)
    part = tl.load(source + 1, mask=inside, other=0.0)
    total = tl.where(live, tl.sum(shrink * part, 1), 1.0)
    weighted = tl.sum(shrink * (tl.load(source + 2, mask=inside, other=0.0) + part * fall), 1)
    chosen = tl.max(tl.load(source + 3, mask=inside, other=MASKED), 1)
    in_bits = tl.log2(total)
    out = start + row
    tl.store(logprob + out, ((chosen - top) * scale - in_bits) * LN_2, mask=live)
    tl.store(entropy + out, (in_bits - weighted / total) * LN_2, mask=live)
    tl.store(peak + out, top, mask=live)
    tl.store(log_total + out, in_bits, mask=live)


@triton.jit
def logit_gradient(softmax, log2_softmax, hit, grad_logprob, grad_entropy, entropy, HAS_ENTROPY: tl.constexpr):
    """Compute d loss / d (logit / temperature), (R, C), by the formula at the head of this file."""
    gradient = tl.where(hit, grad_logprob[:, None], 0.0) - softmax * grad_logprob[:, None]
    if HAS_ENTROPY:
        gradient -= grad_entropy[:, None] * softmax * (log2_softmax * LN_2 + entropy[:, None])
    return gradient


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_BY_ROW)
def _gradient_kernel(
    hidden, weight, bias, targets, dlogits, peak, log_total, entropy, grad_logprob, grad_entropy, start, rows, vocab,
    width, hidden_stride, weight_stride, stride, splits, tiles_per_split, scale, inverse_temperature,
    HAS_BIAS: tl.constexpr, HAS_ENTROPY: tl.constexpr, DESCRIPTORS: tl.constexpr, FLATTEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute gradients by the logits of rows [start, start + rows), whose logits are computed again."""
    first_row, split = _first_row_and_split(rows, splits, ROWS, GROUP)
    row = first_row + tl.arange(0, ROWS)
    live = row < rows
    at = start + row
    target = tl.load(targets + at, mask=live, other=-1)
    top = tl.load(peak + at, mask=live, other=0.0)
    in_bits = tl.load(log_total + at, mask=live, other=0.0)
    # 2. their upstream gradients; those of logit / temperature become those of the logit
    by_logprob = tl.load(grad_logprob + at, mask=live, other=0.0).to(tl.float32) * inverse_temperature
    by_entropy = by_logprob
    row_entropy = by_logprob
    if HAS_ENTROPY:
        by_entropy = tl.load(grad_entropy + at, mask=live, other=0.0).to(tl.float32) * inverse_temperature
        row_entropy = tl.load(entropy + at, mask=live, other=0.0)
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(vocab, COLUMNS))
    for tile in tl.range(first_tile, last_tile, flatten=FLATTEN):
        first_column = tile * COLUMNS
        logits = _logits(
            hidden, weight, bias, start + first_row, first_column, start + rows, vocab, width,
            hidden_stride, weight_stride, HAS_BIAS, DESCRIPTORS, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        column = first_column + tl.arange(0, COLUMNS)
        log2_softmax = (logits - top[:, None]) * scale - in_bits[:, None]
        hit = column[None, :] == target[:, None]
        gradient = logit_gradient(
            tl.exp2(log2_softmax), log2_softmax, hit, by_logprob, by_entropy, row_entropy, HAS_ENTROPY
        )
        _store(dlogits, gradient, first_row, first_column, rows, stride, DESCRIPTORS, ROWS, COLUMNS)
