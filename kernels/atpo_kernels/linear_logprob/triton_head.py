"""The LM head's Triton kernels: statistics of the softmax of `hidden @ weight.T`, and gradients by its logits.

A program owns a tile of rows and a range of the vocabulary; the logits of one tile exist in its registers at a time, as
the float32 accumulators of the product. Exponentials are powers of 2, and differences are taken before they are scaled:
with c = 1 / (temperature ln 2), softmax = 2^((logit - peak) c - log_total).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, log
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from atpo_kernels.devices import processors, target_of
from atpo_kernels.linear_logprob.tiles import Tile, tile_for, vocab_splits

LN_2 = tl.constexpr(log(2))
MASKED = tl.constexpr(-1e30)  # the logit of a column beyond the vocabulary: finite, so that 0 * MASKED is 0
STORED_BITS = tl.constexpr(15)  # exponentials are stored times 2^15: float16 then has all its digits down to 2^-29
STORED_SCALE = tl.constexpr(2.0**STORED_BITS.value)
ROWS_PER_LAUNCH = 1 << 16  # of a statistics pass: bounds the partial results
_ANY_VALUE = ["start", "rows", "splits", "tiles_per_split"]


@triton.jit
def _first_row_and_split(rows, splits, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Order of programs: GROUP row tiles side by side through all ranges of the vocabulary, then the next GROUP."""
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
    """(ROWS, COLUMNS) float32 logits before the temperature; MASKED beyond the vocabulary, anything beyond row_end."""
    column = tl.arange(0, COLUMNS)
    inside = first_column + column < vocab
    logits = tl.zeros((ROWS, COLUMNS), tl.float32)
    if DESCRIPTORS:
        for k in range(0, width, DEPTH):
            logits = tl.dot(hidden.load([first_row, k]), weight.load([first_column, k]).T, logits)
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


@triton.jit(do_not_specialize=_ANY_VALUE)
def _statistics_kernel(
    hidden, weight, bias, targets, partial, exponentials, references, start, rows, vocab, width,
    hidden_stride, weight_stride, stride, capacity, splits, tiles_per_split, scale,
    HAS_BIAS: tl.constexpr, STORED: tl.constexpr, DESCRIPTORS: tl.constexpr, FLATTEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Statistics of rows [start, start + rows) over one range of the vocabulary, and with STORED their exponentials.

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


@triton.jit(do_not_specialize=_ANY_VALUE)
def _merge_kernel(
    partial, logprob, entropy, peak, log_total, start, rows, splits, scale,
    ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Statistics of rows from those of the ranges of the vocabulary; SPLITS is the next power of 2."""
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
def logit_gradient(softmax, log2_softmax, hit, up_logprob, up_entropy, entropy, HAS_ENTROPY: tl.constexpr):
    """d loss / d (logit / temperature), (R, C): up_logprob (1[target] - p) - up_entropy p (ln p + entropy)."""
    gradient = tl.where(hit, up_logprob[:, None], 0.0) - softmax * up_logprob[:, None]
    if HAS_ENTROPY:
        gradient -= up_entropy[:, None] * softmax * (log2_softmax * LN_2 + entropy[:, None])
    return gradient


@triton.jit(do_not_specialize=_ANY_VALUE)
def _gradient_kernel(
    hidden, weight, bias, targets, dlogits, peak, log_total, entropy, up_logprob, up_entropy, start, rows, vocab, width,
    hidden_stride, weight_stride, stride, splits, tiles_per_split, scale, inverse_temperature,
    HAS_BIAS: tl.constexpr, HAS_ENTROPY: tl.constexpr, DESCRIPTORS: tl.constexpr, FLATTEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Gradients by the logits of rows [start, start + rows), from logits computed again and known statistics."""
    first_row, split = _first_row_and_split(rows, splits, ROWS, GROUP)
    row = first_row + tl.arange(0, ROWS)
    live = row < rows
    at = start + row
    target = tl.load(targets + at, mask=live, other=-1)
    top = tl.load(peak + at, mask=live, other=0.0)
    in_bits = tl.load(log_total + at, mask=live, other=0.0)
    # a gradient of logit / temperature becomes one of the logit
    up = tl.load(up_logprob + at, mask=live, other=0.0).to(tl.float32) * inverse_temperature
    up_2 = up
    spread = up
    if HAS_ENTROPY:
        up_2 = tl.load(up_entropy + at, mask=live, other=0.0).to(tl.float32) * inverse_temperature
        spread = tl.load(entropy + at, mask=live, other=0.0)
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
        gradient = logit_gradient(tl.exp2(log2_softmax), log2_softmax, hit, up, up_2, spread, HAS_ENTROPY)
        _store(dlogits, gradient, first_row, first_column, rows, stride, DESCRIPTORS, ROWS, COLUMNS)


class Statistics(NamedTuple):
    """What is known of every row once its logits have been seen; (A,) float32 each."""

    logprob: Tensor
    entropy: Tensor
    peak: Tensor  # largest logit
    log_total: Tensor  # log2 of the sum over the vocabulary of 2^((logit - peak) c)


class Scratch(NamedTuple):
    """Room for a chunk of rows: first their exponentials, then in their place the gradients by their logits.

    float16 rounds the exponentials by an eighth of what bfloat16 would: their error does not show beside the one
    rounding of the gradients, which is as plain PyTorch's.
    """

    exponentials: Tensor  # (capacity, V) float16 (float32)
    dlogits: Tensor  # (capacity, V) dtype of hidden, the same memory
    references: Tensor  # (tiles of the vocabulary, capacity) float32 peak that the exponentials are relative to


@dataclass(slots=True)
class TritonHead:
    """One call's LM head on the device: operands as the kernels take them."""

    hidden: Tensor  # (A, D) rows contiguous and aligned
    weight: Tensor  # (V, D) likewise
    bias: Tensor | None  # (V,)
    targets: Tensor  # (A,)
    temperature: float
    tile: Tile
    workers: int

    @classmethod
    def prepare(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> TritonHead:
        """Copies only operands whose rows the kernels cannot read in place."""
        hidden, weight = _aligned_rows(hidden.detach()), _aligned_rows(weight.detach())
        tile = tile_for(target_of(hidden.device), hidden.dtype)
        bias = None if bias is None else bias.detach().contiguous()
        return cls(hidden, weight, bias, targets.contiguous(), temperature, tile, processors(hidden.device))

    def take(self, rows: Tensor) -> TritonHead:  # (C,) int64
        """The same head over some of the rows, copied."""
        return replace(self, hidden=_aligned_rows(self.hidden[rows]), targets=self.targets[rows])

    @property
    def scale(self) -> float:
        """c of the module's derivation."""
        return 1 / (self.temperature * log(2))

    def scratch(self, rows: int) -> Scratch:
        """Room for the logits of a chunk; rows start at multiples of 128 bytes."""
        vocab = self.weight.shape[0]
        buffer = self.hidden.new_empty(rows, ceil(vocab / 64) * 64)
        exponentials = buffer if buffer.dtype == torch.float32 else buffer.view(torch.float16)
        tiles = ceil(vocab / self.tile.columns)
        references = torch.empty(tiles, rows, dtype=torch.float32, device=buffer.device)
        return Scratch(exponentials[:, :vocab], buffer[:, :vocab], references)

    def empty_statistics(self) -> Statistics:
        """Room for the statistics of all rows."""
        rows, device = self.hidden.shape[0], self.hidden.device
        return Statistics(*torch.empty(4, rows, dtype=torch.float32, device=device).unbind())

    def statistics(self, out: Statistics, start: int, rows: int, scratch: Scratch | None = None) -> None:
        """Fill in rows [start, start + rows); with `scratch`, for at most its capacity, keep their exponentials."""
        step = rows if scratch is not None else ROWS_PER_LAUNCH
        for first in range(start, start + rows, max(step, 1)):
            self._statistics(out, first, min(step, start + rows - first), scratch)

    def _statistics(self, out: Statistics, start: int, rows: int, scratch: Scratch | None) -> None:
        splits, grid = self._grid(rows)
        partial = torch.empty(rows, splits, 4, dtype=torch.float32, device=self.hidden.device)
        exponentials, references, stride, capacity = None, None, 0, 0
        if scratch is not None:
            exponentials, references = self._out(scratch.exponentials), scratch.references
            stride, capacity = scratch.exponentials.stride(0), scratch.references.shape[1]
        _statistics_kernel[grid](
            *self._operands(), self.targets, partial, exponentials, references, start, rows, *self._sizes(),
            stride, capacity, splits, self._tiles_per_split(splits), self.scale,
            STORED=scratch is not None, **self._constants(),
        )  # fmt: skip
        block, padded = merge_block(splits), triton.next_power_of_2(splits)
        _merge_kernel[(ceil(rows / block),)](
            partial, *out, start, rows, splits, self.scale, ROWS=block, SPLITS=padded
        )  # fmt: skip

    def dlogits(
        self,
        buffer: Tensor,  # (capacity, V) receives d loss / d logits of the rows
        known: Statistics,
        up_logprob: Tensor,  # (A,)
        up_entropy: Tensor | None,  # (A,)
        start: int,
        rows: int,
    ) -> Tensor:  # (rows, V)
        """Gradients by the logits of rows [start, start + rows), from logits computed again."""
        splits, grid = self._grid(rows)
        _gradient_kernel[grid](
            *self._operands(), self.targets, self._out(buffer), known.peak, known.log_total, known.entropy,
            up_logprob, up_entropy, start, rows, *self._sizes(), buffer.stride(0),
            splits, self._tiles_per_split(splits), self.scale, 1 / self.temperature,
            HAS_ENTROPY=up_entropy is not None, **self._constants(),
        )  # fmt: skip
        return buffer[:rows]

    def _grid(self, rows: int) -> tuple[int, tuple[int]]:
        splits = vocab_splits(rows, self.weight.shape[0], self.tile, self.workers)
        return splits, (ceil(rows / self.tile.rows) * splits,)

    def _tiles_per_split(self, splits: int) -> int:
        return ceil(ceil(self.weight.shape[0] / self.tile.columns) / splits)

    def _operands(self) -> tuple[Any, Any, Any]:
        tile = self.tile
        if not tile.descriptors:
            return self.hidden, self.weight, self.bias
        hidden = TensorDescriptor.from_tensor(self.hidden, [tile.rows, tile.depth])
        return hidden, TensorDescriptor.from_tensor(self.weight, [tile.columns, tile.depth]), self.bias

    def _out(self, buffer: Tensor) -> Any:
        tile = self.tile
        return TensorDescriptor.from_tensor(buffer, [tile.rows, tile.columns]) if tile.descriptors else buffer

    def _sizes(self) -> tuple[int, int, int, int]:
        return self.weight.shape[0], self.weight.shape[1], self.hidden.stride(0), self.weight.stride(0)

    def _constants(self) -> dict[str, Any]:
        return launch_constants(self.tile, self.bias is not None)


def launch_constants(tile: Tile, has_bias: bool) -> dict[str, Any]:
    """How a tile reaches a kernel and its launch.

    Flattened loops fetch the next tile while this one's exponentials are computed; with a bias they take too many
    registers.
    """
    return {
        "HAS_BIAS": has_bias,
        "DESCRIPTORS": tile.descriptors,
        "FLATTEN": tile.descriptors and not has_bias,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "GROUP": tile.group,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def merge_block(splits: int) -> int:
    """Rows that a program merges: as many as make 1024 partial results."""
    return 1024 // triton.next_power_of_2(splits)


def _aligned_rows(matrix: Tensor) -> Tensor:  # (M, N) -> (M, N)
    """The matrix, or a copy, with contiguous rows that start at multiples of 16 bytes (what descriptors ask for)."""
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.itemsize % 16 == 0
    if aligned and (matrix.stride(1) == 1 or matrix.shape[1] == 1):
        return matrix
    rows, width = matrix.shape
    return matrix.new_empty(rows, ceil(width / 16) * 16)[:, :width].copy_(matrix)
