"""Triton kernels between the exponentials of a chunk and its gradients: which rows count, d loss / d logits in place.

The statistics pass of `linear_logprob` leaves 2^x, x = (logit - reference) c, in a scratch buffer, with one reference
per row and tile of columns. Once the loss kernels of `turn_policy_loss` have the upstream gradients of the rows,

    softmax p = 2^x 2^((reference - peak) c - log_total)

and the gradient formula of `linear_logprob` turn them into d loss / d logits, in the same memory. Rows whose upstream
gradient is 0 are skipped: the others move to the front, so that the products for hidden and weight are over them only.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from atpo_kernels.linear_logprob.kernels import LN_2, STORED_BITS, logit_gradient

LOG2_E = tl.constexpr(1 / LN_2.value)
TINY = tl.constexpr(2.0**-126)  # smallest normal float32: log2 of an underflowed exponential stays finite
_ANY_VALUE = ["start", "rows", "count", "capacity"]
# Vectors over rows, read from a row that may be any; `count` is one number.
_BY_ROW = ["references", "kept", "count", "targets", "logprob", "entropy", "peak", "log_total"]
_BY_ROW += ["grad_logprob", "grad_entropy"]


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_BY_ROW)
def _kept_rows_kernel(grad_logprob, kept, count, start, rows, BLOCK: tl.constexpr):
    """List in kept[:count] the rows of [start, start + rows) whose gradient is not 0, in order, counted from start.

    One program: a chunk has a few thousand rows.
    """
    found = tl.zeros((), tl.int32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        value = tl.load(grad_logprob + start + row, mask=row < rows, other=0.0)
        keep = (value != 0) & (row < rows)
        place = found + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(kept + place, row, mask=keep)
        found += tl.sum(keep.to(tl.int32), 0)
    tl.store(count, found)


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_BY_ROW)
def _softmax_gradient_kernel(
    exponentials, dlogits, references, kept, count, targets, logprob, entropy, peak, log_total, grad_logprob,
    grad_entropy, start, stride, capacity, scale, inverse_temperature,
    ALL_ROWS: tl.constexpr, HAS_ENTROPY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Overwrite the exponentials of the kept rows by d loss / d logits, and move these rows to the front.

    A program owns one tile of columns and goes down its rows. Row i of the result comes from row kept[i] >= i, so in
    order nothing is overwritten before it is read. The softmax of the target is taken from its log-prob, which has not
    been rounded. `exponentials` and `dlogits` are the same memory.
    """
    tile = tl.program_id(0)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < stride)[None, :]  # rows are padded, and whole vectors are moved
    total = count if ALL_ROWS else tl.load(count)
    for first in range(0, total, ROWS):
        # 1. where the rows of this step lie
        slot = first + tl.arange(0, ROWS)
        live = slot < total
        row = slot
        if not ALL_ROWS:
            row = tl.load(kept + slot, mask=live, other=0)
        at = start + row
        source = exponentials + row.to(tl.int64)[:, None] * stride + column[None, :]
        exponential = tl.load(source, mask=live[:, None] & inside, other=0.0).to(tl.float32)
        # 2. their softmax
        reference = tl.load(references + tile * capacity + row, mask=live, other=0.0)
        shift = (reference - tl.load(peak + at, mask=live, other=0.0)) * scale
        shift -= tl.load(log_total + at, mask=live, other=0.0) + STORED_BITS
        hit = column[None, :] == tl.load(targets + at, mask=live, other=-1)[:, None]
        exact = tl.load(logprob + at, mask=live, other=0.0) * LOG2_E
        softmax = tl.where(hit, tl.exp2(exact)[:, None], exponential * tl.exp2(shift)[:, None])
        log2_softmax = tl.where(hit, exact[:, None], tl.log2(tl.maximum(exponential, TINY)) + shift[:, None])
        # 3. gradient by the logits
        by_logprob = tl.load(grad_logprob + at, mask=live, other=0.0) * inverse_temperature
        by_entropy = by_logprob
        row_entropy = by_logprob
        if HAS_ENTROPY:
            by_entropy = tl.load(grad_entropy + at, mask=live, other=0.0) * inverse_temperature
            row_entropy = tl.load(entropy + at, mask=live, other=0.0)
        gradient = logit_gradient(softmax, log2_softmax, hit, by_logprob, by_entropy, row_entropy, HAS_ENTROPY)
        # 4. a row may be another thread's source in this step: all have read before any writes
        tl.debug_barrier()
        out = dlogits + slot.to(tl.int64)[:, None] * stride + column[None, :]
        tl.store(out, gradient.to(dlogits.dtype.element_ty), mask=live[:, None] & inside)
