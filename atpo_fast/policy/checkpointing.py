"""Activation checkpointing that leaves tokens without gradient out of the backward (design, section 5).

Once the loss is known, so are the rows of the final hidden states that carry gradient: those of clipped turns are 0.
A token k is needed if a row q that sees it, k <= q < subtree_end[k], carries some; the gradient of every other token is
exactly 0 at every layer. So each layer's saved input is cut to the needed tokens, which are closed under ancestors and
therefore a packed row of their own, and only those are computed again and differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

WORTH_CUTTING = 0.95  # tokens are left out when no more than this share is needed
BY_TOKEN = ("position_ids", "position_embeddings")  # what decoder layers are given by token, as (1, T, ...)


class GradientTokens:
    """Which tokens of a row the backward needs; filled in when the gradient of the final hidden states arrives.

    Args:
        subtree_end: (T,) of the row, on the device.
        make_blocks: makes the attention's block lists from a row's subtree_end.
    """

    def __init__(self, subtree_end: Tensor, make_blocks: Callable[[Tensor], Any]):
        self._subtree_end, self._make_blocks = subtree_end, make_blocks
        self.index: Tensor | None = None  # (K,) int64 in order; None: all
        self.dropped = 0  # T - K
        self._by_name: dict[str, Any] = {}

    def observe(self, gradient: Tensor) -> None:  # (1, T, D)
        """Find the needed tokens. Waits for the device once: their number decides the sizes of what follows."""
        end = self._subtree_end.long()
        carried = torch.nn.functional.pad(gradient[0].ne(0).any(-1).cumsum(0), (1, 0))  # (T+1,) rows before each
        needed = carried[end] > carried[:-1]
        needed[:1] = True  # a layer wants at least one token
        index = needed.nonzero().squeeze(1)
        if len(index) > WORTH_CUTTING * len(needed):
            return
        place = torch.nn.functional.pad(needed.cumsum(0), (1, 0))
        subtree_end = place[end][index].int()
        self.index, self.dropped = index, len(needed) - len(index)
        self._by_name = {"subtree_end": subtree_end, "tree_blocks": self._make_blocks(subtree_end)}

    def cut(self, run: partial[Tensor]) -> partial[Tensor]:
        """A layer's call over the needed tokens."""
        changes = dict(self._by_name)
        for name in BY_TOKEN:
            value = run.keywords.get(name)
            if value is not None:
                changes[name] = tuple(map(self.take, value)) if isinstance(value, tuple) else self.take(value)
        return partial(run.func, *run.args, **(run.keywords | changes))

    def take(self, values: Tensor) -> Tensor:  # (1, T, ...) -> (1, K, ...)
        """Of the needed tokens."""
        return values if self.index is None else values.index_select(1, self.index)

    def put_back(self, values: Tensor, like: Tensor) -> Tensor:  # (1, K, ...), (1, T, ...) -> (1, T, ...)
        """Zeros for the others."""
        return values if self.index is None else torch.zeros_like(like).index_copy_(1, self.index, values)


class _Layer(torch.autograd.Function):
    """A decoder layer whose input alone is kept."""

    @staticmethod
    def forward(ctx: Any, run: partial[Tensor], tokens: GradientTokens, hidden: Tensor) -> Tensor:  # type: ignore[override]
        ctx.run, ctx.tokens = run, tokens
        ctx.save_for_backward(hidden)
        return run(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:  # type: ignore[override]
        (hidden,) = ctx.saved_tensors
        tokens: GradientTokens = ctx.tokens
        kept = tokens.take(hidden.detach()).requires_grad_()
        with torch.enable_grad():
            out = (ctx.run if tokens.index is None else tokens.cut(ctx.run))(kept)
        torch.autograd.backward(out, tokens.take(grad))
        assert kept.grad is not None
        return None, None, tokens.put_back(kept.grad, hidden)


def checkpoint_layer(run: partial[Tensor], hidden: Tensor) -> Tensor:  # (1, T, D)
    """Hugging Face's hook for checkpointing a decoder layer; its keyword arguments hold `gradient_tokens`."""
    return _Layer.apply(run, run.keywords["gradient_tokens"], hidden)


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Keep each decoder layer's input alone in training.

    Raises ValueError for models that draw random numbers in a layer, which would be others the second time.
    """
    rates = {name: rate for name, rate in vars(model.config).items() if name.endswith("dropout") and rate}
    if rates:
        raise ValueError(f"{model.config.model_type}: gradient checkpointing needs {', '.join(rates)} to be 0")
    model.enable_input_require_grads()
    set_function: Callable[..., None] = model._set_gradient_checkpointing
    set_function(enable=True, gradient_checkpointing_func=checkpoint_layer)
