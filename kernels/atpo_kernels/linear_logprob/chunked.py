"""`linear_logprob` with few logits at a time: those of a chunk of rows, or in the backward of a tile of rows and words.

Exponentials are powers of 2: exp2 is several times faster than exp on CPU, above all where it underflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atpo_kernels.dispatch import kernel_context

# A chunk: rows of the whole vocabulary, whose logits are kept from the statistics to the gradients.
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 29}
_MIN_ROWS = {"cpu": 192, "cuda": 1024}
# A tile: rows and words whose logits are computed again; near square, so that matrix products run fast.
_TILE = {"cpu": (512, 2048), "cuda": (4096, 32768)}
# A block: rows of a chunk or tile that pass through the elementwise operations together; on a CPU they stay in cache.
_BLOCK_BYTES = {"cpu": 1 << 19, "cuda": 1 << 29}
LN_2 = math.log(2)


def rows_per_chunk(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows whose logits fill the chunk buffer: enough to keep a matrix product busy."""
    return max(_MIN_ROWS[_kind(device)], _CHUNK_BYTES[_kind(device)] // (vocab * dtype.itemsize))


def blocks(chunk: Tensor) -> list[slice]:  # (C, V)
    """The rows of a chunk, block by block."""
    size = max(1, _BLOCK_BYTES[_kind(chunk.device)] // (chunk.shape[1] * chunk.itemsize))
    return [slice(start, min(start + size, len(chunk))) for start in range(0, len(chunk), size)]


def move_to_front(chunk: Tensor, rows: Tensor) -> Tensor:  # (C, V), (K,) increasing -> (K, V)
    """Some rows of a chunk, in its first rows; without a second chunk in memory."""
    for block in blocks(chunk[: len(rows)]):
        chunk[block] = chunk[rows[block]]
    return chunk[: len(rows)]


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "cuda"


@dataclass(slots=True)
class Head:
    """The LM head, or the part of it for some words, ready to make float32 (float64) logits."""

    weight: Tensor  # (V, D) in the statistics dtype
    bias: Tensor | None  # (V,) likewise
    temperature: float
    first: int = 0  # the word of weight[0]

    @classmethod
    def prepare(cls, weight: Tensor, bias: Tensor | None, temperature: float) -> Head:
        """Casts half-precision weights once, so that logits are never rounded to half precision."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return cls(weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype), temperature)

    def part(self, words: slice) -> Head:
        """For some of the words."""
        return Head(self.weight[words], None if self.bias is None else self.bias[words], self.temperature, words.start)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:  # (C, D), (>=C, V) -> (C, V)
        """Logits, before the temperature, written into the first rows of `out`."""
        out = out[: hidden.shape[0]]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def exponentials(self, logits: Tensor, peak: Tensor) -> Tensor:  # (C, V), (C,) -> (C, V)
        """Overwrite `logits` by exp((logits - peak) / temperature); returns the base-2 logarithm of that.

        Subtracting before scaling keeps the digits of the likely tokens.
        """
        logarithm = torch.sub(logits, peak[:, None]).mul_(1 / (self.temperature * LN_2))
        torch.exp2(logarithm, out=logits)
        return logarithm

    def buffer(self, rows: int) -> Tensor:
        """(C, V) for the logits of a chunk of at most `rows` rows."""
        vocab = self.weight.shape[0]
        return self.weight.new_empty(min(rows, rows_per_chunk(vocab, self.weight.dtype, self.weight.device)), vocab)


class Statistics(NamedTuple):
    """What is known of every row once its logits have been seen; (A,) each."""

    logprob: Tensor
    entropy: Tensor
    peak: Tensor  # largest logit
    total: Tensor  # sum over the vocabulary of exp((logits - peak) / temperature)


@dataclass(slots=True)
class HeadGradients:
    """Sums of gradients over chunks; None where not asked for. Sums over rows are float32 (float64)."""

    hidden: Tensor | None  # (A, D) dtype of hidden
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)

    @classmethod
    def zeros(cls, hidden: Tensor, head: Head, needs: tuple[bool, bool, bool]) -> HeadGradients:
        """Zeros for those of (hidden, weight, bias) that need a gradient."""
        needs_hidden, needs_weight, needs_bias = needs
        return cls(
            torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None,
            torch.zeros_like(head.weight, memory_format=torch.contiguous_format) if needs_weight else None,
            torch.zeros_like(head.bias) if needs_bias and head.bias is not None else None,
        )

    def part(self, hidden: Tensor | None, words: slice) -> HeadGradients:
        """For some of the words, and with other rows of `hidden`."""
        weight, bias = (None if x is None else x[words] for x in (self.weight, self.bias))
        return HeadGradients(hidden, weight, bias)

    def add_chunk(
        self,
        rows: slice | Tensor,  # C of the A rows
        hidden: Tensor,  # (C, D) in the statistics dtype
        head: Head,
        targets: Tensor,  # (C,) words; those that the head does not have count for nothing here
        known: Statistics,  # (C,) each
        exponential: Tensor,  # (C, V) exp((logits - peak) / temperature), overwritten
        up: tuple[Tensor, Tensor | None],  # (C,) gradients by logprob and by entropy
    ) -> None:
        """Add the gradients of a chunk of rows by the words of `head`, whose rows `self.weight` and `self.bias` hold.

        With e = total * softmax, d loss / d logits = -(e * factor - total * up_logprob * onehot) / (total * T), where
        factor = up_logprob + up_entropy * (log softmax + entropy). What is constant over a row is applied to the (C, D)
        sides of the products, which saves passes over (C, V).
        """
        up_logprob, up_entropy = up
        scale = -1 / (known.total * head.temperature)
        if up_entropy is None:
            onehot, scale = known.total, scale * up_logprob
        else:
            onehot = known.total * up_logprob
            constant = up_logprob + up_entropy * (known.entropy - known.total.log())
            _multiply_by_factor(exponential, up_entropy, constant)
        at = targets - head.first
        inside = at.clamp(0, len(head.weight) - 1)
        exponential.scatter_add_(1, inside[:, None], torch.where(at == inside, -onehot, 0)[:, None])
        if self.hidden is not None:
            self.hidden[rows] += (exponential @ head.weight).mul_(scale[:, None]).to(self.hidden.dtype)
        if self.weight is not None:
            self.weight.addmm_(exponential.t(), hidden * scale[:, None])
        if self.bias is not None:
            self.bias.addmv_(exponential.t(), scale)


def _multiply_by_factor(
    exponential: Tensor,  # (C, V) e, multiplied in place by slope * ln e + constant
    slope: Tensor,  # (C,)
    constant: Tensor,  # (C,)
) -> None:
    """Where e has underflowed to 0 the product stays 0, whatever stands for its logarithm."""
    tiny = torch.finfo(exponential.dtype).tiny
    for rows in blocks(exponential):
        logarithm = exponential[rows].clamp_min(tiny).log2_()
        exponential[rows] *= logarithm.mul_((slope[rows] * LN_2)[:, None]).add_(constant[rows, None])


def chunk_statistics(
    head: Head,
    logits: Tensor,  # (C, V), overwritten by exp((logits - peak) / temperature)
    targets: Tensor,  # (C,)
) -> Statistics:
    """Statistics of a chunk."""
    peak, total, target, weighted = logits.new_empty(4, len(logits)).unbind()
    for rows in blocks(logits):
        block = logits[rows]
        torch.amax(block, 1, out=peak[rows])
        logarithm = head.exponentials(block, peak[rows])
        torch.gather(logarithm, 1, targets[rows, None], out=target[rows, None])
        torch.sum(block, 1, out=total[rows])
        torch.sum(logarithm.mul_(block), 1, out=weighted[rows])
    log_total = total.log2()
    return Statistics((target - log_total) * LN_2, (log_total - weighted / total) * LN_2, peak, total)


def statistics(hidden: Tensor, head: Head, targets: Tensor) -> Statistics:
    """Statistics of all rows of hidden (A, D)."""
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

    Rows with zero gradient cost nothing.
    """
    size, width = _TILE[_kind(hidden.device)]
    rows, vocab = _rows_with_gradient(grad_logprob, grad_entropy), len(head.weight)
    buffer = head.weight.new_empty(min(rows.numel(), size) * min(vocab, width))
    for part in rows.split(size) if rows.numel() else ():
        chunk, seen = hidden[part].to(buffer.dtype), Statistics(*(x[part] for x in known))
        up_logprob = torch.zeros_like(seen.total) if grad_logprob is None else grad_logprob[part]
        up = (up_logprob, None if grad_entropy is None else grad_entropy[part])
        by_hidden = None if gradients.hidden is None else torch.zeros_like(chunk)
        for first in range(0, vocab, width):
            words = slice(first, first + width)
            tile = head.part(words)
            logits = tile.logits(chunk, buffer[: len(part) * len(tile.weight)].view(len(part), -1))
            for block in blocks(logits):
                tile.exponentials(logits[block], seen.peak[block])
            gradients.part(by_hidden, words).add_chunk(slice(None), chunk, tile, targets[part], seen, logits, up)
        if gradients.hidden is not None and by_hidden is not None:
            gradients.hidden[part] = by_hidden.to(gradients.hidden.dtype)


def _rows_with_gradient(*gradients: Tensor | None) -> Tensor:
    """Indices of rows where any (A,) gradient is not zero."""
    moved = [gradient != 0 for gradient in gradients if gradient is not None]
    return (moved[0] if len(moved) == 1 else moved[0] | moved[1]).nonzero().squeeze(1)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        known = statistics(hidden, Head.prepare(weight, bias, temperature), targets)
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
        hidden, weight, bias, targets, *known = ctx.saved_tensors
        head = Head.prepare(weight, bias, ctx.temperature)
        sums = HeadGradients.zeros(hidden, head, ctx.needs_input_grad[:3])
        with kernel_context(hidden):
            accumulate_gradients(sums, hidden, head, targets, Statistics(*known), grad_logprob, grad_entropy)
        weight_grad = None if sums.weight is None else sums.weight.to(weight.dtype)
        bias_grad = None if sums.bias is None else sums.bias.to(bias.dtype)
        return sums.hidden, weight_grad, bias_grad, None, None


def linear_logprob_chunked(
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (A,) int64
    bias: Tensor | None,  # (V,)
    temperature: float,
) -> tuple[Tensor, Tensor]:  # (A,), (A,)
    """See `linear_logprob`."""
    needs_grad = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if needs_grad and torch.is_grad_enabled():
        return _LinearLogprob.apply(hidden, weight, bias, targets, temperature)
    known = statistics(hidden.detach(), Head.prepare(weight, bias, temperature), targets)
    return known.logprob, known.entropy
