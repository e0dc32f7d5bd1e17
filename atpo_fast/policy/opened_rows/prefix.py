"""The tensors of opened rows that rows below read, and the gradients they return (docs/design.md#opened-rows).

A tree over the row budget is computed depth-first (`plan.py`). An opened row is forwarded without gradient and leaves
the keys and values of every attention layer, the state of every layer with one, and its last final hidden state. The
rows below read them, and their backward adds gradients to them, in float32. When these rows are done, the opened row is
closed: forwarded once more with gradient, where what they sent back enters its own backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atpo_fast.policy.opened_rows.plan import Kind, Pass
from atpo_fast.tree.packed_rows import PackedTrees, empty_row


@dataclass(slots=True)
class Kept:
    """A tensor of an opened row, and the sum of its gradients from the rows below."""

    value: Tensor  # (n, ...)
    gradient: Tensor | None = None  # (n, ...) float32, or float64 for a float64 value

    def add(self, gradient: Tensor) -> None:
        """Add the gradient from one row, in float32 or wider."""
        if self.gradient is None:
            self.gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        else:
            self.gradient += gradient


@dataclass(slots=True)
class OpenedRow:
    """The tensors of an opened row that the rows below it read."""

    keys: dict[int, Kept] = field(default_factory=dict)  # keys of each attention layer: (T, Hkv, d)
    values: dict[int, Kept] = field(default_factory=dict)  # values of each attention layer: (T, Hkv, d)
    inputs: dict[int, Kept] = field(default_factory=dict)  # last inputs of each convolution: (at most W, C)
    states: dict[int, Kept] = field(default_factory=dict)  # end state of each recurrence: (1, ...)
    last_hidden: Kept | None = None  # (1, D) hidden state that predicts the first action token of the turns below
    layer_outputs: list[Tensor] = field(default_factory=list)  # outputs of checkpointed layers: (1, T, D)


@dataclass(frozen=True, slots=True)
class RowPrefix:
    """The opened rows that a pass over a row reads or fills."""

    above: tuple[OpenedRow, ...] = ()  # opened rows above, root first: their tokens are the row's prefix
    own: OpenedRow | None = None  # tensors of the row itself; filled when it is opened, read when it is closed
    closing: bool = False

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:  # (T, Hkv, d) -> (P+T, Hkv, d)
        """Put the row's keys and values of a layer behind those of the rows above."""
        if self.own is not None and not self.closing:
            self.own.keys[layer] = Kept(key.detach())
            self.own.values[layer] = Kept(value.detach())
        elif self.own is not None:
            key, value = Close.apply(key, self.own.keys[layer]), Close.apply(value, self.own.values[layer])
        if self.above:
            key = Continue.apply(key, *(row.keys[layer] for row in self.above))
            value = Continue.apply(value, *(row.values[layer] for row in self.above))
        return key, value

    def predicting(self, hidden: Tensor, predictor: Tensor) -> Tensor:  # (T, D), (A,) -> (A, D)
        """Select the final hidden states that predict the action tokens; -1 is the prefix's last."""
        if self.own is not None and not self.closing:
            self.own.last_hidden = Kept(hidden[-1:].detach().clone())
        elif self.own is not None:
            hidden = Close.apply(hidden, self.own.last_hidden)
        if not self.above:
            return hidden.index_select(0, predictor)
        return Continue.apply(hidden, self.above[-1].last_hidden).index_select(0, predictor + 1)


NO_PREFIX = RowPrefix()


class Continue(torch.autograd.Function):
    """Concatenation of kept tensors and the row's own, which collects the gradients of the kept ones."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, *kept: Kept) -> Tensor:  # type: ignore[override]
        """Concatenate along the first axis."""
        ctx.kept = kept
        return torch.cat([*(k.value for k in kept), own])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Split the gradient; the kept tensors take theirs."""
        sizes = [len(k.value) for k in ctx.kept]
        *parts, rest = grad.split([*sizes, len(grad) - sum(sizes)])
        for kept, part in zip(ctx.kept, parts, strict=True):
            kept.add(part)
        return rest, *(None for _ in parts)


class Close(torch.autograd.Function):
    """Identity that adds the collected gradients of the kept rows, its last ones, in the backward."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, kept: Kept) -> Tensor:  # type: ignore[override]
        """Return `own`."""
        ctx.kept = kept
        return own.view_as(own)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Add what the rows below have collected to the gradient of the last rows."""
        back = ctx.kept.gradient
        if back is None:
            return grad, None
        total = torch.cat([grad[: len(grad) - len(back)], (grad[len(grad) - len(back) :] + back).to(grad.dtype)])
        return total, None


def walk(rows: Sequence[PackedTrees], passes: Sequence[Pass]) -> Iterator[tuple[Kind, PackedTrees, RowPrefix]]:
    """Yield kind, row and prefix of every pass of a rank, in order.

    Nothing here refers to what a row left once it is closed, so its memory is free when the caller forgets it too.
    """
    opened: list[OpenedRow] = []
    empty: list[OpenedRow] = []  # rows opened because another rank opened one
    for step in passes:
        row = empty_row(rows[0].weight_pos.dtype) if step.row is None else rows[step.row]
        stack = empty if step.row is None else opened
        if step.kind == "whole":
            yield step.kind, row, RowPrefix(above=tuple(opened[: row.depth]))
            continue
        own = stack.pop() if step.kind == "close" else OpenedRow()
        above = tuple(opened) if step.row is not None else ()
        yield step.kind, row, RowPrefix(above=above, own=own, closing=step.kind == "close")
        if step.kind == "open":
            stack.append(own)
