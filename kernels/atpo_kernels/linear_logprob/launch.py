"""Launches of the LM head's kernels, and `linear_logprob` on them.

Without gradients one pass gives the statistics of all rows. The backward computes the logits of a chunk of rows again,
turns them into d loss / d logits, and forms the gradients from those by two matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from atpo_kernels.autograd import HeadGrads, LogprobImplementation, logprob_with_gradients
from atpo_kernels.devices import processors, target_of
from atpo_kernels.linear_logprob.kernels import _gradient_kernel, _merge_kernel, _statistics_kernel
from atpo_kernels.linear_logprob.tiles import MERGED_ROWS, MOST_SPLITS, Tile, tile_for, vocab_splits
from atpo_kernels.records import HeadInputs, HeadOptions

SCRATCH_BYTES = 896 << 20  # of the gradients by a chunk's logits
ROWS_PER_LAUNCH = 1 << 16  # of a statistics pass: bounds the partial results


class Statistics(NamedTuple):
    """Statistics of every row's softmax; (A,) float32 each."""

    logprob: Tensor
    entropy: Tensor
    peak: Tensor  # largest logit
    log_total: Tensor  # log2 of the sum over the vocabulary of 2^((logit - peak) c)


class Scratch(NamedTuple):
    """Buffer of a chunk of rows: first their exponentials, then in their place the gradients by their logits.

    float16 rounds the exponentials by an eighth of what bfloat16 would: their error does not show beside the one
    rounding of the gradients, which is as plain PyTorch's.
    """

    exponentials: Tensor  # (capacity, V) float16 (float32)
    dlogits: Tensor  # (capacity, V) dtype of hidden, the same memory
    references: Tensor  # (tiles of the vocabulary, capacity) float32 peak that the exponentials are relative to


@dataclass(slots=True)
class TritonHead:
    """LM head of one call, its operands as the kernels take them."""

    hidden: Tensor  # (A, D) rows contiguous and aligned
    weight: Tensor  # (V, D) rows contiguous and aligned
    bias: Tensor | None  # (V,)
    targets: Tensor  # (A,)
    temperature: float
    tile: Tile
    workers: int

    @classmethod
    def prepare(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions
    ) -> TritonHead:
        """Copy only operands whose rows the kernels cannot read in place. Raises ValueError for a soft cap."""
        if options.softcap is not None:
            raise ValueError("impl='triton' has no soft cap of logits; use impl='auto' or 'torch'")
        hidden, weight = _aligned_rows(hidden.detach()), _aligned_rows(weight.detach())
        tile = tile_for(target_of(hidden.device), hidden.dtype)
        bias = None if bias is None else bias.detach().contiguous()
        return cls(hidden, weight, bias, targets.contiguous(), options.temperature, tile, processors(hidden.device))

    def take(self, rows: Tensor) -> TritonHead:  # (C,) int64
        """Copy some of the rows under the same head."""
        return replace(self, hidden=_aligned_rows(self.hidden[rows]), targets=self.targets[rows])

    @property
    def scale(self) -> float:
        """Factor c of the derivation in kernels.py."""
        return 1 / (self.temperature * log(2))

    def scratch(self, rows: int) -> Scratch:
        """Allocate room for the logits of a chunk; rows start at multiples of 128 bytes."""
        vocab = self.weight.shape[0]
        buffer = self.hidden.new_empty(rows, ceil(vocab / 64) * 64)
        exponentials = buffer if buffer.dtype == torch.float32 else buffer.view(torch.float16)
        tiles = ceil(vocab / self.tile.columns)
        references = torch.empty(tiles, rows, dtype=torch.float32, device=buffer.device)
        return Scratch(exponentials[:, :vocab], buffer[:, :vocab], references)

    def empty_statistics(self) -> Statistics:
        """Allocate room for the statistics of all rows."""
        rows = self.hidden.shape[0]
        padded = ceil(rows / 4) * 4  # each begins at a multiple of 16 bytes, whatever the number of rows
        values = torch.empty(4, padded, dtype=torch.float32, device=self.hidden.device)
        return Statistics(*values[:, :rows].unbind())

    def statistics(self, out: Statistics, start: int, rows: int, scratch: Scratch | None = None) -> None:
        """Fill in rows [start, start + rows); with `scratch`, whose capacity they fit, keep their exponentials."""
        step = rows if scratch is not None else ROWS_PER_LAUNCH
        for first in range(start, start + rows, max(step, 1)):
            self._statistics(out, first, min(step, start + rows - first), scratch)

    def _statistics(self, out: Statistics, start: int, rows: int, scratch: Scratch | None) -> None:
        """Launch one pass over ranges of the vocabulary, and the merge of their statistics."""
        splits, grid = self._grid(rows)
        partial = torch.empty(rows, splits, 4, dtype=torch.float32, device=self.hidden.device)
        exponentials, references, stride, capacity = None, None, 0, 0
        if scratch is not None:
            exponentials, references = self._out(scratch.exponentials), scratch.references
            stride, capacity = scratch.exponentials.stride(0), scratch.references.shape[1]
        _statistics_kernel[grid](
            *self._operands(), self.targets, partial, exponentials, references, start, rows, *self._sizes(),
            stride, capacity, splits, self._tiles_per_split(splits), self.scale,
            STORED=scratch is not None, BRANCH=self.tile.branch, **self._constants(),
        )  # fmt: skip
        _merge_kernel[(ceil(rows / MERGED_ROWS),)](
            partial, *out, start, rows, splits, self.scale, ROWS=MERGED_ROWS, SPLITS=MOST_SPLITS
        )  # fmt: skip

    def dlogits(
        self,
        buffer: Tensor,  # (capacity, V) receives d loss / d logits of the rows
        known: Statistics,
        grad_logprob: Tensor,  # (A,)
        grad_entropy: Tensor | None,  # (A,)
        start: int,
        rows: int,
    ) -> Tensor:  # (rows, V)
        """Compute the gradients by the logits of rows [start, start + rows), from logits computed again."""
        splits, grid = self._grid(rows)
        _gradient_kernel[grid](
            *self._operands(), self.targets, self._out(buffer), known.peak, known.log_total, known.entropy,
            grad_logprob, grad_entropy, start, rows, *self._sizes(), buffer.stride(0),
            splits, self._tiles_per_split(splits), self.scale, 1 / self.temperature,
            HAS_ENTROPY=grad_entropy is not None, **self._constants(),
        )  # fmt: skip
        return buffer[:rows]

    def _grid(self, rows: int) -> tuple[int, tuple[int]]:
        """Choose the ranges of the vocabulary, and the programs: one for each row tile and range."""
        splits = vocab_splits(rows, self.weight.shape[0], self.tile, self.workers)
        return splits, (ceil(rows / self.tile.rows) * splits,)

    def _tiles_per_split(self, splits: int) -> int:
        return ceil(ceil(self.weight.shape[0] / self.tile.columns) / splits)

    def _operands(self) -> tuple[Any, Any, Any]:
        """Give hidden, weight and bias as the kernels load them: by descriptors or through pointers."""
        tile = self.tile
        if tile.warp_specialised:
            triton.set_allocator(_allocate)  # for this thread: the memory of the descriptors that kernels make
        if tile.warp_specialised or not tile.descriptors:
            return self.hidden, self.weight, self.bias
        hidden = TensorDescriptor.from_tensor(self.hidden, [tile.rows, tile.depth])
        return hidden, TensorDescriptor.from_tensor(self.weight, [tile.columns, tile.depth]), self.bias

    def _out(self, buffer: Tensor) -> Any:
        """Give a scratch buffer as the kernels store into it."""
        tile = self.tile
        if tile.warp_specialised or not tile.descriptors:
            return buffer
        return TensorDescriptor.from_tensor(buffer, [tile.rows, tile.columns])

    def _sizes(self) -> tuple[int, int, int, int]:
        """List vocabulary, width, and the strides of hidden and weight."""
        return self.weight.shape[0], self.weight.shape[1], self.hidden.stride(0), self.weight.stride(0)

    def _constants(self) -> dict[str, Any]:
        return self.tile.constants(self.bias is not None)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Allocate what Triton asks for on the current GPU; torch aligns to 512 bytes, more than it ever asks."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def rows_per_chunk(head: TritonHead) -> int:
    """Choose the rows of a chunk: its (rows, V) scratch buffer stays within SCRATCH_BYTES, in whole tiles."""
    tile, vocab = head.tile.rows, head.weight.shape[0]
    fitting = SCRATCH_BYTES // (ceil(vocab / 64) * 64 * head.hidden.itemsize) // tile * tile
    return min(max(fitting, tile), head.hidden.shape[0])


class Gradients:
    """Sums over chunks of the gradients of hidden, weight and bias; None where they are not needed."""

    def __init__(self, head: TritonHead, needs: Sequence[bool]):
        (rows, width), vocab, device = head.hidden.shape, head.weight.shape[0], head.hidden.device
        needs_hidden, needs_weight, needs_bias = needs
        self._head, self._empty = head, True
        self.hidden = head.hidden.new_zeros(rows, width) if needs_hidden else None  # (A, D)
        self.weight: Tensor | None = None  # (V, D) float32
        self.bias: Tensor | None = None  # (V,) float32
        if needs_weight:
            self.weight = torch.empty(vocab, width, dtype=torch.float32, device=device)
        if needs_bias:
            self.bias = torch.empty(vocab, dtype=torch.float32, device=device)

    def add(self, dlogits: Tensor, hidden: Tensor, rows: slice | Tensor) -> None:  # (C, V), (C, D), C of the A rows
        """Add the gradients of a chunk, by hidden, weight and bias."""
        if self.hidden is not None:
            by_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
            matmul_float32(dlogits, self._head.weight, by_hidden)
            if isinstance(rows, slice):
                self.hidden[rows] = by_hidden
            else:
                self.hidden.index_copy_(0, rows, by_hidden.to(hidden.dtype))
        if self.weight is not None:
            matmul_float32(dlogits.t(), hidden, self.weight, accumulate=not self._empty)
        if self.bias is not None:
            ones = dlogits.new_ones(len(dlogits), 1)
            matmul_float32(dlogits.t(), ones, self.bias[:, None], accumulate=not self._empty)
        self._empty = False

    def finish(self) -> HeadInputs:
        """Return the sums; zeros where no chunk was added."""
        if self._empty:
            for total in (self.weight, self.bias):
                if total is not None:
                    total.zero_()
        return HeadInputs(self.hidden, self.weight, self.bias)


def matmul_float32(
    left: Tensor,  # (M, K)
    right: Tensor,  # (K, N) same dtype
    out: Tensor,  # (M, N) float32
    accumulate: bool = False,
) -> Tensor:  # (M, N)
    """Write or add left @ right to `out`, from float32 accumulators that are never rounded to half precision."""
    if left.dtype == torch.float32 or left.device.type != "cuda":
        left, right = left.float(), right.float()
        return out.addmm_(left, right) if accumulate else torch.mm(left, right, out=out)
    if accumulate:
        return torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, out=out)
    return torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=out)


def _aligned_rows(matrix: Tensor) -> Tensor:  # (M, N) -> (M, N)
    """Copy the matrix unless its rows are contiguous and start at multiples of 16 bytes, as descriptors require."""
    apart = matrix.stride(0) > 0 and matrix.stride(0) * matrix.itemsize % 16 == 0
    if apart and matrix.data_ptr() % 16 == 0 and matrix.stride(1) == 1:
        return matrix
    rows, width = matrix.shape
    return matrix.new_empty(rows, ceil(width / 16) * 16)[:, :width].copy_(matrix)


def _forward(
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (A,)
    options: HeadOptions,
) -> Statistics:  # (A,) each
    """Compute the softmax statistics of all rows."""
    head = TritonHead.prepare(hidden, weight, bias, targets, options)
    known = head.empty_statistics()
    head.statistics(known, 0, len(targets))
    return known


def _backward(
    inputs: HeadInputs,
    targets: Tensor,  # (A,)
    options: HeadOptions,
    known: Sequence[Tensor],  # (A,) each
    grads: HeadGrads,
    needs: Sequence[bool],
) -> HeadInputs:
    """Compute the gradients of hidden, weight and bias, where they are needed, chunk by chunk."""
    hidden, weight, bias = inputs
    assert hidden is not None and weight is not None
    head = TritonHead.prepare(hidden, weight, bias, targets, options)
    sums = Gradients(head, needs)
    grad_logprob = torch.zeros_like(known[0]) if grads[0] is None else grads[0].contiguous()
    grad_entropy = None if grads[1] is None else grads[1].contiguous()
    chunk = rows_per_chunk(head)
    buffer = head.scratch(chunk).dlogits
    for start in range(0, len(targets), max(chunk, 1)):
        rows = min(chunk, len(targets) - start)
        dlogits = head.dlogits(buffer, Statistics(*known), grad_logprob, grad_entropy, start, rows)
        sums.add(dlogits, head.hidden[start : start + rows], slice(start, start + rows))
    return HeadInputs(*(None if total is None else total.to(hidden.dtype) for total in sums.finish()))


_IMPLEMENTATION = LogprobImplementation(_forward, _backward)


def linear_logprob_triton(
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (A,) int64
    bias: Tensor | None,  # (V,)
    options: HeadOptions,
) -> tuple[Tensor, Tensor]:  # (A,), (A,)
    """Compute `linear_logprob` by Triton kernels; see there."""
    return logprob_with_gradients(_IMPLEMENTATION, hidden, weight, bias, targets, options)
