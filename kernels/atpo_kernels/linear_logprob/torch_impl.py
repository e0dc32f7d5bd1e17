"""`linear_logprob` in PyTorch with few logits at a time: a chunk of rows, or in the backward a tile of rows and words.

Exponentials are powers of 2: exp2 is several times faster than exp on CPU, above all where it underflows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from atpo_kernels.autograd import HeadGrads, LogprobImplementation, logprob_with_gradients
from atpo_kernels.linear_logprob.tiles import elementwise_blocks, torch_rows, torch_tile
from atpo_kernels.records import HeadInputs, HeadOptions

LN_2 = math.log(2)


def move_to_front(chunk: Tensor, rows: Tensor) -> Tensor:  # (C, V), (K,) increasing -> (K, V)
    """Move some rows of a chunk to its front, without a second chunk in memory."""
    for block in elementwise_blocks(chunk[: len(rows)]):
        chunk[block] = chunk[rows[block]]
    return chunk[: len(rows)]


@dataclass(slots=True)
class Head:
    """LM head, or the part of it for some words, ready to make float32 (float64) logits."""

    weight: Tensor  # (V, D) in the statistics dtype
    bias: Tensor | None  # (V,) in the statistics dtype
    options: HeadOptions
    first: int = 0  # the word of weight[0]

    @classmethod
    def prepare(cls, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> Head:
        """Cast half-precision weights once, so that logits are never rounded to half precision."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return cls(weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype), options)

    def part(self, words: slice) -> Head:
        """Cut out the head of some of the words."""
        return Head(self.weight[words], None if self.bias is None else self.bias[words], self.options, words.start)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:  # (C, D), (>=C, V) -> (C, V)
        """Write the logits, before the temperature, into the first rows of `out`."""
        out, cap = out[: hidden.shape[0]], self.options.softcap
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)
        return out if cap is None else out.div_(cap).tanh_().mul_(cap)

    def exponentials(self, logits: Tensor, peak: Tensor) -> Tensor:  # (C, V), (C,) -> (C, V)
        """Overwrite `logits` by exp((logits - peak) / temperature), and return the base-2 logarithm of that.

        Subtracting before scaling keeps the digits of the likely tokens.
        """
        logarithm = torch.sub(logits, peak[:, None]).mul_(1 / (self.options.temperature * LN_2))
        torch.exp2(logarithm, out=logits)
        return logarithm

    def buffer(self, rows: int) -> Tensor:  # (C, V)
        """Allocate room for the logits of a chunk of at most `rows` rows."""
        vocab = self.weight.shape[0]
        return self.weight.new_empty(min(rows, torch_rows(vocab, self.weight.dtype, self.weight.device)), vocab)


class Statistics(NamedTuple):
    """Statistics of every row's softmax; (A,) each."""

    logprob: Tensor
    entropy: Tensor
    peak: Tensor  # largest logit
    total: Tensor  # sum over the vocabulary of exp((logits - peak) / temperature)


@dataclass(slots=True)
class HeadGradients:
    """Sums of gradients over chunks; None where they are not needed. Sums over rows are float32 (float64)."""

    hidden: Tensor | None  # (A, D) dtype of hidden
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)

    @classmethod
    def zeros(cls, hidden: Tensor, head: Head, needs: Sequence[bool]) -> HeadGradients:
        """Begin with zeros for those of (hidden, weight, bias) that need a gradient."""
        needs_hidden, needs_weight, needs_bias = needs
        return cls(
            torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None,
            torch.zeros_like(head.weight, memory_format=torch.contiguous_format) if needs_weight else None,
            torch.zeros_like(head.bias) if needs_bias and head.bias is not None else None,
        )

    def part(self, hidden: Tensor | None, words: slice) -> HeadGradients:
        """Cut out the sums of some of the words, with other rows for `hidden`."""
        weight, bias = (None if x is None else x[words] for x in (self.weight, self.bias))
        return HeadGradients(hidden, weight, bias)

    def add_chunk(
        self,
        rows: slice | Tensor,  # C of the A rows
        hidden: Tensor,  # (C, D) in the statistics dtype
        head: Head,
        targets: Tensor,  # (C,) words; those that are not of this head add nothing
        known: Statistics,  # (C,) each
        exponential: Tensor,  # (C, V) exp((logits - peak) / temperature), overwritten
        grads: tuple[Tensor, Tensor | None],  # (C,) upstream, of log-prob and of entropy
    ) -> None:
        """Add the gradients of a chunk of rows by the words of `head`, whose rows `self.weight` and `self.bias` hold.

        With e = total * softmax, d loss / d logits = -(e * factor - total * grad_logprob * onehot) / (total * T), where
        factor = grad_logprob + grad_entropy * (log softmax + entropy). What is constant over a row is applied to the
        (C, D) sides of the products, which saves passes over (C, V). A soft cap multiplies the whole by its slope.
        """
        grad_logprob, grad_entropy = grads
        slope = _slope(exponential, head.options, known.peak)
        scale = -1 / (known.total * head.options.temperature)
        if grad_entropy is None:
            onehot, scale = known.total, scale * grad_logprob
        else:
            onehot = known.total * grad_logprob
            constant = grad_logprob + grad_entropy * (known.entropy - known.total.log())
            _multiply_by_factor(exponential, grad_entropy, constant)
        at = targets - head.first
        inside = at.clamp(0, len(head.weight) - 1)
        exponential.scatter_add_(1, inside[:, None], torch.where(at == inside, -onehot, 0)[:, None])
        if slope is not None:
            exponential *= slope
        if self.hidden is not None:
            self.hidden[rows] += (exponential @ head.weight).mul_(scale[:, None]).to(self.hidden.dtype)
        if self.weight is not None:
            self.weight.addmm_(exponential.t(), hidden * scale[:, None])
        if self.bias is not None:
            self.bias.addmv_(exponential.t(), scale)


def _slope(
    exponential: Tensor,  # (C, V) exp((logits - peak) / temperature)
    options: HeadOptions,
    peak: Tensor,  # (C,)
) -> Tensor | None:  # (C, V)
    """Compute the slope of the soft cap, 1 - (logit / softcap)^2; None without one.

    Logits lie within the cap on either side, so exponentials underflow only at temperatures below 2 softcap / 87.
    """
    if options.softcap is None:
        return None
    tiny = torch.finfo(exponential.dtype).tiny
    logits = exponential.clamp_min(tiny).log_().mul_(options.temperature).add_(peak[:, None])
    return logits.div_(options.softcap).square_().neg_().add_(1)


def _multiply_by_factor(
    exponential: Tensor,  # (C, V) e, multiplied by factor * ln e + constant
    factor: Tensor,  # (C,)
    constant: Tensor,  # (C,)
) -> None:
    """Multiply in place. Where e has underflowed to 0 the product stays 0, whatever its logarithm is replaced by."""
    tiny = torch.finfo(exponential.dtype).tiny
    for rows in elementwise_blocks(exponential):
        logarithm = exponential[rows].clamp_min(tiny).log2_()
        exponential[rows] *= logarithm.mul_((factor[rows] * LN_2)[:, None]).add_(constant[rows, None])


def chunk_statistics(
    head: Head,
    logits: Tensor,  # (C, V), overwritten by exp((logits - peak) / temperature)
    targets: Tensor,  # (C,)
) -> Statistics:
    """Compute the softmax statistics of a chunk of rows from its logits."""
    peak, total, target, weighted = logits.new_empty(4, len(logits)).unbind()
    for rows in elementwise_blocks(logits):
        block = logits[rows]
        torch.amax(block, 1, out=peak[rows])
        logarithm = head.exponentials(block, peak[rows])
        torch.gather(logarithm, 1, targets[rows, None], out=target[rows, None])
        torch.sum(block, 1, out=total[rows])
        torch.sum(logarithm.mul_(block), 1, out=weighted[rows])
    log_total = total.log2()
    return Statistics((target - log_total) * LN_2, (log_total - weighted / total) * LN_2, peak, total)


def statistics(hidden: Tensor, head: Head, targets: Tensor) -> Statistics:  # (A, D), (A,) -> (A,) each
    """Compute the statistics of all rows, chunk by chunk."""
    rows = hidden.shape[0]
    buffer = head.buffer(rows)
    result = Statistics(*buffer.new_empty(4, rows))
    for start in range(0, rows, max(len(buffer), 1)):
        part = slice(start, min(start + len(buffer), rows))
        logits = head.logits(hidden[part].to(buffer.dtype), buffer)
        chunk = chunk_statistics(head, logits, targets[part])
        for whole, values in zip(result, chunk, strict=True):
            whole[part] = values
    return result


def accumulate_gradients(
    gradients: HeadGradients,
    hidden: Tensor,  # (A, D)
    head: Head,
    targets: Tensor,  # (A,)
    known: Statistics,
    grad_logprob: Tensor | None,  # (A,)
    grad_entropy: Tensor | None,  # (A,)
) -> None:
    """Recompute the logits in tiles and add the gradients of sum(grad_logprob * logprob + grad_entropy * entropy).

    Rows whose gradients are zero cost nothing.
    """
    size, width = torch_tile(hidden.device)
    rows, vocab = _rows_with_gradient(grad_logprob, grad_entropy), len(head.weight)
    buffer = head.weight.new_empty(min(rows.numel(), size) * min(vocab, width))
    for part in rows.split(size) if rows.numel() else ():
        chunk, seen = hidden[part].to(buffer.dtype), Statistics(*(x[part] for x in known))
        by_logprob = torch.zeros_like(seen.total) if grad_logprob is None else grad_logprob[part]
        grads = (by_logprob, None if grad_entropy is None else grad_entropy[part])
        by_hidden = None if gradients.hidden is None else torch.zeros_like(chunk)
        for first in range(0, vocab, width):
            words = slice(first, first + width)
            tile = head.part(words)
            logits = tile.logits(chunk, buffer[: len(part) * len(tile.weight)].view(len(part), -1))
            for block in elementwise_blocks(logits):
                tile.exponentials(logits[block], seen.peak[block])
            gradients.part(by_hidden, words).add_chunk(slice(None), chunk, tile, targets[part], seen, logits, grads)
        if gradients.hidden is not None and by_hidden is not None:
            gradients.hidden[part] = by_hidden.to(gradients.hidden.dtype)


def _rows_with_gradient(*grads: Tensor | None) -> Tensor:  # (A,) each -> (K,) int64
    """Find the rows where any gradient is not zero; all others are skipped."""
    kept = [grad != 0 for grad in grads if grad is not None]
    return (kept[0] if len(kept) == 1 else kept[0] | kept[1]).nonzero().squeeze(1)


def _forward(
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (A,)
    options: HeadOptions,
) -> Statistics:  # (A,) each
    """Compute the softmax statistics of all rows."""
    return statistics(hidden, Head.prepare(weight, bias, options), targets)


def _backward(
    inputs: HeadInputs,
    targets: Tensor,  # (A,)
    options: HeadOptions,
    known: Sequence[Tensor],  # (A,) each
    grads: HeadGrads,
    needs: Sequence[bool],
) -> HeadInputs:
    """Compute the gradients of hidden, weight and bias, where they are needed, tile by tile."""
    hidden, weight, bias = inputs
    assert hidden is not None and weight is not None
    head = Head.prepare(weight, bias, options)
    sums = HeadGradients.zeros(hidden, head, needs)
    accumulate_gradients(sums, hidden, head, targets, Statistics(*known), *grads)
    totals = (sums.hidden, sums.weight, sums.bias)
    return HeadInputs(*(None if total is None else total.to(hidden.dtype) for total in totals))


_IMPLEMENTATION = LogprobImplementation(_forward, _backward)


def linear_logprob_torch(
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (A,) int64
    bias: Tensor | None,  # (V,)
    options: HeadOptions,
) -> tuple[Tensor, Tensor]:  # (A,), (A,)
    """Compute `linear_logprob` in PyTorch; see there."""
    return logprob_with_gradients(_IMPLEMENTATION, hidden, weight, bias, targets, options)
