"""States of layers that have one, in a row of trees and the opened rows above it (docs/design.md#recurrent-layers)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from atpo_fast.policy.opened_rows.prefix import Close, Continue, Kept, RowPrefix
from atpo_fast.recurrent.carried import CarriedStates
from atpo_fast.recurrent.segments import Segments


class RowStates(CarriedStates):
    """The states of a row whose roots start from that of the row above, or from zero.

    An opened row is one path, so the state after its only segment is what the rows below start from.
    """

    def __init__(self, segments: Segments, prefix: RowPrefix):
        self.segments, self.prefix = segments, prefix

    def continue_inputs(self, layer: int, own: Tensor, width: int) -> Tensor:  # (T, C) -> (W + T, C)
        """Put the last inputs of the rows above before the row's own."""
        row, tokens = self.prefix.own, len(own)
        if row is not None and not self.prefix.closing:
            row.inputs[layer] = Kept(own[-width:].detach().clone())
        elif row is not None:
            own = Close.apply(own, row.inputs[layer])
        if self.prefix.above:
            own = Continue.apply(own, *(above.inputs[layer] for above in self.prefix.above))
        return pad(own, (0, 0, width, 0))[-(width + tokens) :]

    def initial(self, layer: int, like: Tensor) -> Tensor | None:
        """Return the end state of the row above, (1, ...)."""
        return _Read.apply(like, self.prefix.above[-1].states[layer]) if self.prefix.above else None

    def final(self, layer: int, out: Tensor, states: Tensor) -> Tensor:  # (T, ...), (n, ...) -> (T, ...)
        """Keep the end state of a row that is opened; send its gradient back where it is closed."""
        row = self.prefix.own
        if row is not None and not self.prefix.closing:
            row.states[layer] = Kept(states.detach())
        elif row is not None:
            out = _Leave.apply(out, states, row.states[layer])
        return out


class _Read(torch.autograd.Function):
    """A kept state, whose gradient is collected; `like` ties it to the graph."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, kept: Kept) -> Tensor:  # type: ignore[override]
        ctx.kept = kept
        return kept.value.view_as(kept.value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.kept.add(grad)
        return None, None


class _Leave(torch.autograd.Function):
    """A layer's output unchanged; its backward gives the end state the gradient that rows below have collected."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, state: Tensor, kept: Kept) -> Tensor:  # type: ignore[override]
        ctx.kept, ctx.dtype = kept, state.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        back = ctx.kept.gradient
        return grad, None if back is None else back.to(ctx.dtype), None
