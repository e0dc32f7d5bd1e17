"""`linear_logprob` in chunks of rows: at most one chunk's logits exist, in the forward and in the backward.

Logits are kept in base 2 (times log2 e): exp2 is several times faster than exp on CPU, above all where it underflows.
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
_LN_2 = math.log(2)


def rows_per_chunk(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows whose logits fill the chunk buffer: enough to keep a matrix product busy, few enough to stay in cache."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    return max(_MIN_ROWS[kind], _CHUNK_BYTES[kind] // (vocab * dtype.itemsize))


@dataclass(slots=True)
class Head:
    """The LM head, ready to make float32 (float64) logits, and where its gradients accumulate."""

    weight: Tensor  # (V, D) as given
    exact_weight: Tensor  # (V, D) in the statistics dtype
    bias: Tensor | None  # (V,) in the statistics dtype
    temperature: float

    @classmethod
    def prepare(cls, weight: Tensor, bias: Tensor | None, temperature: float) -> Head:
        """Casts half-precision weights once, so that logits are never rounded to half precision."""
        dtype = statistics_dtype(weight.dtype)
        weight = weight.detach()
        return cls(weight, weight.to(dtype), None if bias is None else bias.detach().to(dtype), temperature)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:  # (C, D), (>=C, V) -> (C, V)
        """log2 e times the logits over the temperature, written into the first rows of `out`."""
        out = out[: hidden.shape[0]]
        scale = 1.0 / (self.temperature * _LN_2)
        start = out if self.bias is None else self.bias
        beta = 0.0 if self.bias is None else scale
        return torch.addmm(start, hidden, self.exact_weight.t(), beta=beta, alpha=scale, out=out)

    def buffer(self, rows: int) -> Tensor:
        """(C, V) for the logits of a chunk of at most `rows` rows."""
        chunk = min(rows, rows_per_chunk(self.exact_weight.shape[0], self.exact_weight.dtype, self.weight.device))
        return self.exact_weight.new_empty(chunk, self.exact_weight.shape[0])


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
            torch.zeros_like(head.exact_weight, memory_format=torch.contiguous_format) if needs_weight else None,
            torch.zeros_like(head.bias) if needs_bias and head.bias is not None else None,
        )

    def add(self, rows: slice | Tensor, hidden: Tensor, dlogits: Tensor, scale: Tensor, head: Head) -> None:
        """Add the chunk's part, where d loss / d (logits / temperature) = `scale[:, None] * dlogits`.

        hidden: (C, D) in the statistics dtype; dlogits: (C, V); scale: (C,). The row scale is applied to the (C, D)
        sides of the products, which saves a pass over (C, V).
        """
        scale = (scale / head.temperature)[:, None]
        if self.hidden is not None:
            self.hidden[rows] = (dlogits @ head.exact_weight).mul_(scale).to(self.hidden.dtype)
        if self.weight is not None:
            self.weight.addmm_(dlogits.t(), hidden * scale)
        if self.bias is not None:
            self.bias.addmv_(dlogits.t(), scale[:, 0])


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class ChunkStatistics(NamedTuple):
    """(C,) each."""

    logprob: Tensor
    entropy: Tensor
    log2_sum: Tensor  # log2 of the sum over the vocabulary of exp(logits)
    total: Tensor  # sum over the vocabulary of exp(logits - max)


def chunk_statistics(logits: Tensor, targets: Tensor, scratch: Tensor) -> ChunkStatistics:
    """Statistics of (C, V) base-2 logits, which are overwritten; `scratch`, (C, V), receives exp(logits - max)."""
    peak = logits.amax(1, keepdim=True)
    shifted = logits.sub_(peak)
    target = shifted.gather(1, targets[:, None]).squeeze(1)
    exponential = torch.exp2(shifted, out=scratch)
    total = exponential.sum(1)
    log_total = total.log2()
    entropy = log_total - shifted.mul_(exponential).sum(1) / total
    return ChunkStatistics((target - log_total) * _LN_2, entropy * _LN_2, log_total + peak.squeeze(1), total)


def statistics(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and log2 of the sum of exp(logits), (A,) each, of all rows of hidden (A, D)."""
    rows = hidden.shape[0]
    buffer = head.buffer(rows)
    scratch = torch.empty_like(buffer)
    logprob, entropy, log2_sum = (buffer.new_empty(rows) for _ in range(3))
    for start in range(0, rows, max(len(buffer), 1)):
        part = slice(start, min(start + len(buffer), rows))
        logits = head.logits(hidden[part].to(buffer.dtype), buffer)
        chunk = chunk_statistics(logits, targets[part], scratch[: len(logits)])
        logprob[part], entropy[part], log2_sum[part] = chunk.logprob, chunk.entropy, chunk.log2_sum
    return logprob, entropy, log2_sum


def accumulate_gradients(
    gradients: HeadGradients,
    hidden: Tensor,  # (A, D)
    head: Head,
    targets: Tensor,  # (A,)
    log2_sum: Tensor,  # (A,)
    entropy: Tensor,  # (A,)
    grad_logprob: Tensor | None,  # (A,)
    grad_entropy: Tensor | None,  # (A,)
) -> None:
    """Recompute the logits in chunks and add the gradients of sum(grad_logprob * logprob + grad_entropy * entropy).

    Rows with zero gradient cost nothing.
    """
    rows = _rows_with_gradient(grad_logprob, grad_entropy)
    buffer = head.buffer(rows.numel())
    scratch = None if grad_entropy is None else torch.empty_like(buffer)
    for part in rows.split(max(len(buffer), 1)) if rows.numel() else ():
        chunk = hidden[part].to(buffer.dtype)
        log2_softmax = head.logits(chunk, buffer).sub_(log2_sum[part, None])
        wanted = targets[part, None]
        if grad_entropy is None:
            assert grad_logprob is not None
            dlogits, scale = dlogits_of_logprob(log2_softmax.exp2_(), wanted), -grad_logprob[part]
        else:
            assert scratch is not None
            up_logprob = torch.zeros_like(grad_entropy[part]) if grad_logprob is None else grad_logprob[part]
            probs = torch.exp2(log2_softmax, out=scratch[: len(part)])
            dlogits = dlogits_of_both(probs, log2_softmax, wanted, entropy[part], up_logprob, grad_entropy[part])
            scale = torch.ones_like(up_logprob)
        gradients.add(part, chunk, dlogits, scale, head)


def dlogits_of_logprob(probs: Tensor, targets: Tensor, total: Tensor | None = None) -> Tensor:
    """-d logprob / d logits, (C, V), in place of `probs`; times `total` (C,) where `probs` still has that factor."""
    ones = torch.ones_like(targets, dtype=probs.dtype) if total is None else total[:, None]
    return probs.scatter_add_(1, targets, -ones)


def dlogits_of_both(
    probs: Tensor,  # (C, V)
    log2_softmax: Tensor,  # (C, V), overwritten by the result
    targets: Tensor,  # (C, 1)
    entropy: Tensor,  # (C,)
    grad_logprob: Tensor,  # (C,)
    grad_entropy: Tensor,  # (C,)
) -> Tensor:  # (C, V)
    """grad_logprob * (onehot - p) - grad_entropy * p * (log p + H)."""
    # where exp2 underflows p = 0 and log p is finite, so their product is 0
    factor = log2_softmax.add_(entropy[:, None] / _LN_2).mul_(grad_entropy[:, None] * _LN_2)
    factor = factor.add_(grad_logprob[:, None])
    dlogits = factor.mul_(probs).neg_()
    return dlogits.scatter_add_(1, targets, grad_logprob[:, None])


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
        head = Head.prepare(weight, bias, temperature)
        logprob, entropy, log2_sum = statistics(hidden, head, targets)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, log2_sum)
        ctx.temperature = temperature
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_logprob is None and grad_entropy is None:
            return None, None, None, None, None
        hidden, weight, bias, targets, entropy, log2_sum = ctx.saved_tensors
        head = Head.prepare(weight, bias, ctx.temperature)
        sums = HeadGradients.zeros(hidden, head, ctx.needs_input_grad[:3])
        accumulate_gradients(sums, hidden, head, targets, log2_sum, entropy, grad_logprob, grad_entropy)
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
    logprob, entropy, _ = statistics(hidden.detach(), Head.prepare(weight, bias, temperature), targets)
    return logprob, entropy
