"""The gate of tree_attention's kernels: nearer to float64 than rounding allows, and than plain PyTorch is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers.error_bounds import assert_no_less_precise, assert_within, attention_bounds
from tests.helpers.interpreter import DEVICE
from tests.helpers.tree_cases import forward_backward, inputs, tree_mask


def assert_precise(
    end: Tensor,  # (T,)
    heads: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    *,
    sharpness: float = 1.0,
    prefix: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: list[float] | None = None,
    beside_plain: bool = True,
) -> None:
    """Check the output and the gradients of q, k, v and sinks; without `beside_plain` against the bounds alone.

    On tensor cores the bounds are twice as wide: they add towards zero, up to twice an error of rounding.
    """
    end = end.to(DEVICE)
    rounded = inputs(len(end), heads, width, dtype, DEVICE, prefix)
    rounded[0] = (rounded[0].detach() * sharpness).requires_grad_()
    rounded += [] if sinks is None else [torch.tensor(sinks, dtype=dtype, device=DEVICE).requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in rounded]

    def run(tensors: list[Tensor], impl: str) -> list[Tensor]:
        options: dict[str, Any] = {"window": window, "softcap": softcap, "sinks": None if sinks is None else tensors[4]}
        return [x.cpu() for x in forward_backward(tensors, end, impl=impl, **options)]

    truth, ours = run(exact, "reference"), run(rounded, "triton")
    given = [x.detach().cpu() for x in exact]
    bounds = attention_bounds(
        given[:4], tree_mask(end.cpu(), prefix, window), width**-0.5, truth, dtype,
        stored=True, softcap=softcap, sinks=None if sinks is None else given[4],
    )  # fmt: skip
    plain = run(rounded, "reference") if beside_plain else ours
    for t, o, p, bound in zip(truth, ours, plain, bounds, strict=True):
        assert o.dtype == dtype and o.shape == t.shape
        if beside_plain and t.dim() > 1:  # of a number a head the mean square is a matter of luck
            assert_no_less_precise(p, o, t, bound)
        else:
            assert_within(o, t, 2 * bound.worst)
