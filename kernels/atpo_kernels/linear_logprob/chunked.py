"""`linear_logprob` in chunks of rows: at most one chunk's logits exist, in the forward and in the backward.

Exponentials are powers of 2: exp2 is several times faster than exp on CPU, above all where it underflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 1 << 29}
_MIN_ROWS = {"cpu": 128, "cuda": 1024}
LN_2 = math.log(2)


def rows_per_chunk(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows whose logits fill the chunk buffer: enough to keep a matrix product busy, few enough to stay in cache."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    return max(_MIN_ROWS[kind], _CHUNK_BYTES[kind] // (vocab * dtype.itemsize))


@dataclass(slots=True)
class Head:
    """The LM head, ready to make float32 (float64) logits."""

    weight: Tensor  # (V, D) in the statistics dtype
    bias: Tensor | None  # (V,) likewise
    temperature: float

    @classmethod
    def prepare(cls, weight: Tensor, bias: Tensor | None, temperature: float) -> Head:
        """Casts half-precision weights once, so that logits are never rounded to half precision."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return cls(weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype), temperature)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:  # (C, D), (>=C, V) -> (C, V)
        """Logits, before the temperature, written into the first rows of `out`."""
        out = out[: hidden.shape[0]]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def exponentials(self, logits: Tensor, peak: Tensor, out: Tensor) -> Tensor:  # (C, V), (C,), (C, V) -> (C, V)
        """exp((logits - peak) / temperature) into `out`; `logits` become its base-2 logarithm.

        Subtracting before scaling keeps the digits of the likely tokens.
        """
        return torch.exp2(logits.sub_(peak[:, None]).mul_(1 / (self.temperature * LN_2)), out=out)

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

    def add_chunk(
        self,
        rows: slice | Tensor,  # C of the A rows
        hidden: Tensor,  # (C, D) in the statistics dtype
        head: Head,
        targets: Tensor,  # (C,)
        known: Statistics,  # (C,) each
        softmax: tuple[Tensor, Tensor],  # (C, V) base-2 logarithm and value of exp((logits - peak) / T), overwritten
        up: tuple[Tensor, Tensor | None],  # (C,) gradients by logprob and by entropy
    ) -> None:
        """Add the gradients of a chunk of rows.

        With e = total * softmax, d loss / d logits = -(e * factor - total * up_logprob * onehot) / (total * T), where
        factor = up_logprob + up_entropy * (log softmax + entropy). What is constant over a row is applied to the (C, D)
        sides of the products, which saves passes over (C, V).
        """
        logarithm, dlogits = softmax
        up_logprob, up_entropy = up
        scale = -1 / (known.total * head.temperature)
        if up_entropy is None:
            onehot, scale = known.total, scale * up_logprob
        else:
            onehot = known.total * up_logprob
            constant = up_logprob + up_entropy * (known.entropy - known.total.log())
            # where exp2 underflows e = 0 and its logarithm is finite, so their product is 0
            dlogits = logarithm.mul_((up_entropy * LN_2)[:, None]).add_(constant[:, None]).mul_(dlogits)
        dlogits.scatter_add_(1, targets[:, None], -onehot[:, None])
        if self.hidden is not None:
            self.hidden[rows] = (dlogits @ head.weight).mul_(scale[:, None]).to(self.hidden.dtype)
        if self.weight is not None:
            self.weight.addmm_(dlogits.t(), hidden * scale[:, None])
        if self.bias is not None:
            self.bias.addmv_(dlogits.t(), scale)


def chunk_statistics(
    head: Head,
    logits: Tensor,  # (C, V), overwritten by (logits - peak) / temperature in base 2, or by anything if product is it
    targets: Tensor,  # (C,)
    exponential: Tensor,  # (C, V), receives exp((logits - peak) / temperature)
    product: Tensor,  # (C, V) scratch; may be `logits`
) -> Statistics:
    """Statistics of a chunk."""
    peak = logits.amax(1)
    head.exponentials(logits, peak, exponential)
    target = logits.gather(1, targets[:, None]).squeeze(1)
    total = exponential.sum(1)
    log_total = total.log2()
    entropy = log_total - torch.mul(logits, exponential, out=product).sum(1) / total
    return Statistics((target - log_total) * LN_2, entropy * LN_2, peak, total)


def statistics(hidden: Tensor, head: Head, targets: Tensor) -> Statistics:
    """Statistics of all rows of hidden (A, D)."""
    rows = hidden.shape[0]
    buffer = head.buffer(rows)
    scratch = torch.empty_like(buffer)
    result = Statistics(*(buffer.new_empty(rows) for _ in range(4)))
    for start in range(0, rows, max(len(buffer), 1)):
        part = slice(start, min(start + len(buffer), rows))
        logits = head.logits(hidden[part].to(buffer.dtype), buffer)
        chunk = chunk_statistics(head, logits, targets[part], scratch[: len(logits)], logits)
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
    """Recompute the logits in chunks and add the gradients of sum(grad_logprob * logprob + grad_entropy * entropy).

    Rows with zero gradient cost nothing.
    """
    rows = _rows_with_gradient(grad_logprob, grad_entropy)
    buffer = head.buffer(rows.numel())
    scratch = torch.empty_like(buffer)
    for part in rows.split(max(len(buffer), 1)) if rows.numel() else ():
        chunk = hidden[part].to(buffer.dtype)
        logits = head.logits(chunk, buffer)
        exponential = head.exponentials(logits, known.peak[part], scratch[: len(part)])
        seen = Statistics(*(x[part] for x in known))
        up_logprob = torch.zeros_like(seen.total) if grad_logprob is None else grad_logprob[part]
        up_entropy = None if grad_entropy is None else grad_entropy[part]
        gradients.add_chunk(part, chunk, head, targets[part], seen, (logits, exponential), (up_logprob, up_entropy))


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
