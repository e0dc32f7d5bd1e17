"""Autograd functions whose gradients are not those of the operations of their forward.

`attach_gradients` is for losses whose gradients are formed in the forward, `logprob_with_gradients` for the LM
head, whose logits are computed again in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atpo_kernels.devices import kernel_context
from atpo_kernels.records import HeadInputs, HeadOptions

HeadGrads = tuple[Tensor | None, Tensor | None]
"""Upstream gradients of log-prob and entropy, (A,) each; at least one is given."""


def attach_gradients(
    loss: Tensor,  # (), or (A,) with gradients of the same shape
    inputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],  # of the shapes of the inputs
    *,
    unit: Tensor | None = None,  # ()
    consume: bool = False,
) -> Tensor:
    """Return `loss` with these gradients by its inputs; an input whose gradient is None gets none.

    The gradients are `unit` times too large; the backward divides by it. With `consume` the last backward scales them
    in place where their dtype is that of the input, so that no second gradient of a weight is in memory: nobody else
    may hold them then.
    """
    return _KnownGradients.apply(loss, unit, consume, len(inputs), *gradients, *inputs)


class _KnownGradients(torch.autograd.Function):
    """Loss whose gradients are given; see `attach_gradients`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, loss: Tensor, unit: Tensor | None, consume: bool, count: int, *tensors: Tensor | None
    ) -> Tensor:
        gradients, inputs = tensors[:count], tensors[count:]
        if consume:
            ctx.save_for_backward(loss, unit)
            ctx.gradients = gradients  # not saved, so that the backward may overwrite them
        else:
            ctx.save_for_backward(loss, unit, *gradients)
        ctx.consume, ctx.dtypes = consume, [None if x is None else x.dtype for x in inputs]
        return loss.clone()  # a view could not be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _, unit, *saved = ctx.saved_tensors  # raises when the graph is gone, and with it the gradients
        gradients = ctx.gradients if ctx.consume else saved
        in_place = ctx.consume and not torch._C._autograd._get_current_graph_task_keep_graph()
        if in_place:
            ctx.gradients = None
        factor = grad if unit is None else grad / unit
        needed = ctx.needs_input_grad[-len(ctx.dtypes) :]
        scaled = [
            _scaled(known, factor, dtype, in_place) if needs and known is not None else None
            for known, dtype, needs in zip(gradients, ctx.dtypes, needed, strict=True)
        ]
        return None, None, None, None, *(None for _ in scaled), *scaled


def _scaled(known: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """Multiply a known gradient by the upstream gradient, in the dtype of its input."""
    if in_place and known.dtype == dtype:
        return known.mul_(factor)
    return torch.mul(known, factor, out=torch.empty_like(known, dtype=dtype))


class LogprobImplementation(NamedTuple):
    """Forward and backward of one implementation of `linear_logprob`."""

    forward: Callable[[Tensor, Tensor, Tensor | None, Tensor, HeadOptions], tuple[Tensor, ...]]
    """(hidden, weight, bias, targets, options) -> (log-prob, entropy, more that the backward needs), (A,) each."""
    backward: Callable[[HeadInputs, Tensor, HeadOptions, Sequence[Tensor], HeadGrads, Sequence[bool]], HeadInputs]
    """(inputs, targets, options, what the forward returned, upstream gradients, which inputs need a gradient) ->
    gradients of hidden, weight and bias, in their dtypes."""


def logprob_with_gradients(
    implementation: LogprobImplementation,
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (A,) int64
    options: HeadOptions,
) -> tuple[Tensor, Tensor]:  # (A,), (A,)
    """Run an implementation of `linear_logprob`; differentiable where any input asks for it."""
    needs_grad = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if needs_grad and torch.is_grad_enabled():
        return _LinearLogprob.apply(implementation, hidden, weight, bias, targets, options)
    known = implementation.forward(hidden.detach(), weight, bias, targets, options)
    return known[0], known[1]


class _LinearLogprob(torch.autograd.Function):
    """`linear_logprob` of one implementation, which computes its logits again in the backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        implementation: LogprobImplementation,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        known = implementation.forward(hidden, weight, bias, targets, options)
        ctx.save_for_backward(hidden, weight, bias, targets, *known)
        ctx.implementation, ctx.options = implementation, options
        return known[0], known[1]

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_logprob is None and grad_entropy is None:
            return None, None, None, None, None, None
        hidden, weight, bias, targets, *known = ctx.saved_tensors
        inputs, needs = HeadInputs(hidden, weight, bias), ctx.needs_input_grad[1:4]
        with kernel_context(hidden):
            grads = ctx.implementation.backward(
                inputs, targets, ctx.options, known, (grad_logprob, grad_entropy), needs
            )
        return None, *grads, None, None
