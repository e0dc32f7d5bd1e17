"""Triton kernels between a chunk's exponentials and its gradients: which rows count, and d loss / d logits in place."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atpo_kernels.compilation import DTYPE_NAMES, Variant
from atpo_kernels.linear_logprob.tiles import Tile, tile_for
from atpo_kernels.linear_logprob.triton_head import LN_2, STORED_BITS, Scratch, Statistics, TritonHead, logit_gradient

LOG2_E = tl.constexpr(1 / LN_2.value)
TINY = tl.constexpr(2.0**-126)  # smallest normal float32: log2 of an underflowed exponential stays finite
_ANY_VALUE = ["start", "rows", "count"]
KEPT_BLOCK = 1024
GRADIENT_ROWS = {"gpu": 16, "cpu": 4}  # 16 rows x 256 columns are 8 KiB in flight a program


@triton.jit(do_not_specialize=_ANY_VALUE)
def _kept_rows_kernel(coef, kept, count, start, rows, BLOCK: tl.constexpr):
    """kept[:count] = the rows of [start, start + rows) whose coefficient is not 0, in order, counted from start.

    One program: a chunk has a few thousand rows.
    """
    found = tl.zeros((), tl.int32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        value = tl.load(coef + start + row, mask=row < rows, other=0.0)
        keep = (value != 0) & (row < rows)
        place = found + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(kept + place, row, mask=keep)
        found += tl.sum(keep.to(tl.int32), 0)
    tl.store(count, found)


@triton.jit(do_not_specialize=_ANY_VALUE)
def _softmax_gradient_kernel(
    exponentials, dlogits, references, kept, count, targets, logprob, entropy, peak, log_total, up_logprob, up_entropy,
    start, stride, capacity, scale, inverse_temperature,
    ALL_ROWS: tl.constexpr, HAS_ENTROPY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Overwrite the exponentials of the kept rows by d loss / d logits, and move these rows to the front.

    A program owns one tile of columns and goes down its rows. Row i of the result comes from row kept[i] >= i, so in
    order nothing is overwritten before it is read. Softmax = 2^x 2^((reference - peak) c - log_total); the target's
    is taken from its log-prob, which has not been rounded. `exponentials` and `dlogits` are the same memory.
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
        up = tl.load(up_logprob + at, mask=live, other=0.0) * inverse_temperature
        up_2 = up
        spread = up
        if HAS_ENTROPY:
            up_2 = tl.load(up_entropy + at, mask=live, other=0.0) * inverse_temperature
            spread = tl.load(entropy + at, mask=live, other=0.0)
        gradient = logit_gradient(softmax, log2_softmax, hit, up, up_2, spread, HAS_ENTROPY)
        # 4. a row may be another thread's source in this step: all have read before any writes
        tl.debug_barrier()
        out = dlogits + slot.to(tl.int64)[:, None] * stride + column[None, :]
        tl.store(out, gradient.to(dlogits.dtype.element_ty), mask=live[:, None] & inside)


class KeptRows:
    """Rows of a range that carry gradient, found on the device and counted there."""

    def __init__(self, capacity: int, device: torch.device):
        self.index = torch.empty(capacity, dtype=torch.int32, device=device)  # counted from the range's start
        self.count = torch.empty(1, dtype=torch.int32, device=device)
        self._on_host = torch.empty(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def find(self, coef: Tensor, start: int, rows: int) -> None:  # (A,)
        """Start to look for the rows of [start, start + rows) whose coefficient is not 0."""
        _kept_rows_kernel[(1,)](coef, self.index, self.count, start, rows, BLOCK=KEPT_BLOCK, num_warps=8)
        self._on_host.copy_(self.count, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> int:
        """Their number, once the device has come as far as `find`; what was launched since is not waited for."""
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._on_host.numpy()[0])


def softmax_gradient(
    head: TritonHead,
    scratch: Scratch,
    known: Statistics,  # (A,) each
    up: tuple[Tensor, Tensor | None],  # (A,) float32 gradients by logprob and entropy
    start: int,
    rows: int | KeptRows,  # all of that many rows, or the kept ones
) -> None:
    """Turn the exponentials of a chunk's rows into the gradients by their logits, the kept rows first."""
    kept, count, every = (None, rows, True) if isinstance(rows, int) else (rows.index, rows.count, False)
    step = GRADIENT_ROWS["cpu" if scratch.dlogits.device.type == "cpu" else "gpu"]
    _softmax_gradient_kernel[(scratch.references.shape[0],)](
        *scratch, kept, count, head.targets,
        known.logprob, known.entropy, known.peak, known.log_total, *up, start,
        scratch.dlogits.stride(0), scratch.references.shape[1], head.scale, 1 / head.temperature,
        ALL_ROWS=every, HAS_ENTROPY=up[1] is not None, ROWS=step, COLUMNS=head.tile.columns, num_warps=4,
    )  # fmt: skip


def variants(target: str) -> list[Variant]:
    """The kernels of this module on a target ("sm_90", ...); `linear_turn_policy_loss` launches others' as well."""
    integers = dict.fromkeys(("start", "rows"), "i32")
    kept = {"coef": "*fp32", "kept": "*i32", "count": "*i32"}
    found = [
        Variant(
            kernel=_kept_rows_kernel,
            label=f"blocks of {KEPT_BLOCK}",
            types=kept | integers,
            constants={"BLOCK": KEPT_BLOCK},
            num_warps=8,
            divisible=tuple(kept),
        )
    ]
    for dtype, every, has_entropy in product(DTYPE_NAMES, (False, True), (False, True)):
        found.append(_gradient_variant(tile_for(target, dtype), dtype, every, has_entropy))
    return found


def _gradient_variant(tile: Tile, dtype: torch.dtype, every: bool, has_entropy: bool) -> Variant:
    stored = "*fp32" if dtype == torch.float32 else "*fp16"
    floats = ("references", "logprob", "entropy", "peak", "log_total", "up_logprob")
    types = {"exponentials": stored, "dlogits": f"*{DTYPE_NAMES[dtype]}", "targets": "*i64"}
    types |= dict.fromkeys(floats, "*fp32") | {"count": "i32" if every else "*i32"}
    types |= {"start": "i32", "stride": "i32", "capacity": "i32"}
    types |= {"scale": "fp32", "inverse_temperature": "fp32"}
    types |= ({} if every else {"kept": "*i32"}) | ({"up_entropy": "*fp32"} if has_entropy else {})
    constants: dict[str, Any] = {name: None for name in ("kept", "up_entropy") if name not in types}
    constants |= {"ALL_ROWS": every, "HAS_ENTROPY": has_entropy, "ROWS": GRADIENT_ROWS["gpu"], "COLUMNS": tile.columns}
    label = DTYPE_NAMES[dtype] + (", all rows" if every else ", kept rows") + (", entropy" if has_entropy else "")
    pointers = tuple(name for name, kind in types.items() if kind.startswith("*"))
    return Variant(
        kernel=_softmax_gradient_kernel, label=label, types=types, constants=constants, divisible=(*pointers, "stride")
    )
