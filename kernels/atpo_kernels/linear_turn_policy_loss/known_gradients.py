"""A loss whose gradients by the LM head's inputs were formed in its forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atpo_kernels.records import HeadInputs


def with_gradients(loss: Tensor, inputs: HeadInputs, gradients: HeadInputs, unit: Tensor | None = None) -> Tensor:
    """`loss` () with these gradients by its inputs; they are `unit` () times too large."""
    return _KnownGradients.apply(loss, unit, *gradients, *inputs)


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, unit: Tensor | None, *tensors: Tensor | None) -> Tensor:  # type: ignore[override]
        gradients, inputs = tensors[:3], tensors[3:]
        ctx.save_for_backward(loss, unit)
        ctx.gradients = gradients  # not saved, so that the backward may take them
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return loss.clone()  # a view could not be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _, unit = ctx.saved_tensors  # raises when the graph is gone, and with it the gradients
        factor = grad if unit is None else grad / unit
        gradients, kept = ctx.gradients, torch._C._autograd._get_current_graph_task_keep_graph()
        if not kept:
            ctx.gradients = None
        scaled = [
            None if known is None else _scaled(known, factor, dtype, in_place=not kept)
            for known, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return None, None, None, None, None, *scaled


def _scaled(known: Tensor, factor: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """In place there is no second gradient of the weight in memory."""
    if in_place and known.dtype == dtype:
        return known.mul_(factor)
    return torch.mul(known, factor, out=torch.empty_like(known, dtype=dtype))
