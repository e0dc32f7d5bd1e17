"""`linear_logprob` on Triton kernels: one pass without gradients, logits computed again in chunks for them."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atpo_kernels.dispatch import kernel_context
from atpo_kernels.linear_logprob.matmul import matmul_float32
from atpo_kernels.linear_logprob.triton_head import Statistics, TritonHead
from atpo_kernels.linear_logprob.triton_variants import variants
from atpo_kernels.records import HeadInputs

__all__ = ["linear_logprob", "variants"]

SCRATCH_BYTES = 896 << 20  # of the gradients by a chunk's logits


def rows_per_chunk(head: TritonHead) -> int:
    """Rows whose (rows, V) scratch buffer stays within SCRATCH_BYTES, in whole tiles; at most all rows."""
    tile, vocab = head.tile.rows, head.weight.shape[0]
    fitting = SCRATCH_BYTES // (ceil(vocab / 64) * 64 * head.hidden.itemsize) // tile * tile
    return min(max(fitting, tile), head.hidden.shape[0])


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        known = _statistics(TritonHead.prepare(hidden, weight, bias, targets, temperature))
        ctx.save_for_backward(hidden, weight, bias, targets, *known)
        ctx.temperature = temperature
        return known.logprob, known.entropy

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_logprob is None and grad_entropy is None:
            return None, None, None, None, None
        with kernel_context(ctx.saved_tensors[0]):
            return *_backward(ctx, grad_logprob, grad_entropy), None, None


def _backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> HeadInputs:
    """Gradients of hidden, weight and bias, chunk by chunk."""
    hidden, weight, bias, targets, *known = ctx.saved_tensors
    head = TritonHead.prepare(hidden, weight, bias, targets, ctx.temperature)
    sums = Gradients(head, ctx.needs_input_grad[:3])
    up_logprob = torch.zeros_like(known[0]) if grad_logprob is None else grad_logprob.contiguous()
    up_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    chunk = rows_per_chunk(head)
    buffer = head.scratch(chunk).dlogits
    for start in range(0, len(targets), max(chunk, 1)):
        rows = min(chunk, len(targets) - start)
        dlogits = head.dlogits(buffer, Statistics(*known), up_logprob, up_entropy, start, rows)
        sums.add(dlogits, head.hidden[start : start + rows], slice(start, start + rows))
    return HeadInputs(*(None if total is None else total.to(hidden.dtype) for total in sums.finish()))


class Gradients:
    """Sums over chunks of the gradients of hidden, weight and bias; None where not asked for."""

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
        """Add a chunk."""
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
        """The sums; zeros where no chunk was added."""
        if self._empty:
            for total in (self.weight, self.bias):
                if total is not None:
                    total.zero_()
        return HeadInputs(self.hidden, self.weight, self.bias)


def _statistics(head: TritonHead) -> Statistics:
    known = head.empty_statistics()
    head.statistics(known, 0, len(head.targets))
    return known


def linear_logprob(
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (A,) int64
    bias: Tensor | None,  # (V,)
    temperature: float,
) -> tuple[Tensor, Tensor]:  # (A,), (A,)
    """See `atpo_kernels.linear_logprob`."""
    needs_grad = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if needs_grad and torch.is_grad_enabled():
        return _LinearLogprob.apply(hidden, weight, bias, targets, temperature)
    known = _statistics(TritonHead.prepare(hidden, weight, bias, targets, temperature))
    return known.logprob, known.entropy
