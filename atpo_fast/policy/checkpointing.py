"""Activation checkpointing that leaves tokens without gradient out of the backward (docs/design.md#checkpointing).

Once the loss is known, so are the rows of the final hidden states that carry gradient: those of clipped turns are 0.
A token k is needed if a row q that sees it, k <= q < subtree_end[k], carries some; the gradient of every other token is
exactly 0 at every layer. So the saved input is cut to the needed tokens, which are closed under ancestors and therefore
a packed row of their own, and only those are computed again and differentiated.

- `layer` keeps each decoder layer's input and computes the layer again.
- `mlp` keeps what attention needs and the input of each MLP, and computes the MLP again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from atpo_fast.common.choices import GradientCheckpointing
from atpo_fast.policy.opened_rows.prefix import RowPrefix

WORTH_CUTTING = 0.95  # share of needed tokens up to which the others are left out
BY_TOKEN = ("position_ids", "position_embeddings")  # arguments of decoder layers that are (1, T, ...)


class GradientTokens:
    """The tokens of a row that its backward needs, known when the gradient of the final hidden states arrives.

    Args:
        subtree_end: (T,) of the row, on the device.
        structure: makes the keyword arguments that tell layers how tokens hang together from a row's subtree_end.
    """

    def __init__(self, subtree_end: Tensor, structure: Callable[[Tensor], dict[str, Any]]):
        self._subtree_end, self._structure = subtree_end, structure
        self.index: Tensor | None = None  # (K,) int64 in order; None: all
        self.subtree_end: Tensor | None = None  # (K,) int32 of the row of the needed tokens; None: all
        self.skipped = 0  # T - K
        self._attention: dict[str, Any] | None = None  # keyword arguments of layers over that row, once a layer asks
        self._whole: list[Any] = []  # values of the arguments BY_TOKEN ...
        self._cut: dict[str, Any] = {}  # ... and the same of the needed tokens

    def observe(self, gradient: Tensor) -> None:  # (1, T, D)
        """Find the needed tokens. Waits for the device once: their number decides the sizes of what follows."""
        end = self._subtree_end.long()
        carried = nn.functional.pad(gradient[0].ne(0).any(-1).cumsum(0), (1, 0))  # (T+1,) rows before each
        needed = carried[end] > carried[:-1]
        needed[:1] = True  # a layer wants at least one token
        index = needed.nonzero().squeeze(1)
        if len(index) > WORTH_CUTTING * len(needed):
            return
        place = nn.functional.pad(needed.cumsum(0), (1, 0))
        self.index, self.skipped = index, len(needed) - len(index)
        self.subtree_end = place[end][index].int()

    def cut(self, run: partial[Tensor]) -> partial[Tensor]:
        """Restrict a layer's call to the needed tokens."""
        if self.subtree_end is None:
            return run
        if self._attention is None:
            self._attention = {"subtree_end": self.subtree_end} | self._structure(self.subtree_end)
        whole = [run.keywords.get(name) for name in BY_TOKEN]
        if not self._whole or any(new is not old for new, old in zip(whole, self._whole, strict=True)):
            self._whole = whole  # the same objects for every layer, so this happens once
            self._cut = {name: self._take_all(value) for name, value in zip(BY_TOKEN, whole, strict=True)}
        return partial(run.func, *run.args, **(run.keywords | self._attention | self._cut))

    def _take_all(self, value: Tensor | tuple[Tensor, ...] | None) -> Tensor | tuple[Tensor, ...] | None:
        if isinstance(value, tuple):
            return tuple(map(self.take, value))
        return None if value is None else self.take(value)

    def take(self, values: Tensor) -> Tensor:  # (1, T, ...) -> (1, K, ...)
        """Select the needed tokens: (1, T, ...) to (1, K, ...)."""
        return values if self.index is None else values.index_select(1, self.index)

    def put_back(self, values: Tensor, like: Tensor) -> Tensor:  # (1, K, ...), (1, T, ...) -> (1, T, ...)
        """Put values of the needed tokens in their places among zeros: (1, K, ...) to (1, T, ...)."""
        return values if self.index is None else torch.zeros_like(like).index_copy_(1, self.index, values)


class _Recomputed(torch.autograd.Function):
    """A call of which only the inputs are kept; the backward calls again over the needed tokens."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        run: Callable[..., Tensor],
        tokens: GradientTokens,
        known: Tensor | None,
        *inputs: Tensor | None,  # (1, T, ...) each
    ) -> Tensor:
        ctx.run, ctx.tokens = run, tokens
        ctx.save_for_backward(*inputs)
        return run(*inputs) if known is None else known.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        tokens, inputs = ctx.tokens, ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        kept = [
            None if x is None else tokens.take(x.detach()).requires_grad_(needs)
            for x, needs in zip(inputs, needed, strict=True)
        ]
        with torch.enable_grad():
            out = ctx.run(*kept)
        torch.autograd.backward(out, tokens.take(grad))
        grads = [None if x is None or x.grad is None else x.grad for x in kept]
        back = (None if g is None else tokens.put_back(g, x) for g, x in zip(grads, inputs, strict=True))
        return None, None, None, *back


def checkpoint_layer(run: partial[Tensor], *inputs: Tensor | None) -> Tensor:  # (1, T, ...) each
    """Run a decoder layer whose backward computes it again: Hugging Face's hook.

    The inputs are the hidden states, and in some architectures more of each token. The keyword arguments of `run` hold
    the row's `gradient_tokens` and `row_prefix`.

    A row that is closed was forwarded when it was opened, and its layers' outputs are known from there.
    """
    tokens: GradientTokens = run.keywords["gradient_tokens"]
    prefix: RowPrefix = run.keywords["row_prefix"]
    known = prefix.own.layer_outputs.pop(0) if prefix.own is not None and prefix.closing else None
    out = _Recomputed.apply(lambda *kept: tokens.cut(run)(*kept), tokens, known, *inputs)
    if prefix.own is not None and not prefix.closing:
        prefix.own.layer_outputs.append(out)
    return out


def checkpoint_mlp(run: partial[Tensor], *inputs: Tensor | None) -> Tensor:  # (1, T, ...) each
    """Run a decoder layer unchanged, and pass the row's tokens to its MLP."""
    mlp = run.func.__self__.mlp  # type: ignore[attr-defined]  # of the decoder layer, whose call this is
    mlp.gradient_tokens = run.keywords["gradient_tokens"]
    try:
        return run(*inputs)
    finally:
        mlp.gradient_tokens = None


def _mlp_forward(mlp: Any, plain: Callable[[Tensor], Any], hidden: Tensor) -> Any:  # (1, T, D)
    """Run a checkpointed MLP; `plain` is its own forward, which calls the modules that hold its parameters.

    What an MLP returns beside its output, such as the scores of its router, has no gradient here.
    """
    if mlp.gradient_tokens is None:
        return plain(hidden)
    beside: list[Any] = []

    def run(hidden: Tensor) -> Tensor:
        out = plain(hidden)
        if not isinstance(out, tuple):
            return out
        beside[:] = out[1:]
        return out[0]

    out = _Recomputed.apply(run, mlp.gradient_tokens, None, hidden)
    return (out, *beside) if beside else out


def enable_checkpointing(model: PreTrainedModel, choice: GradientCheckpointing) -> None:
    """Let the backward of training compute again what `choice` says.

    Raises ValueError for a choice that does not exist, for models that draw random numbers in a layer, which would be
    others the second time, under `layer` for models whose layers share keys and values, and under `mlp` for models
    without a module of that name in every decoder layer.
    """
    if choice == "none":
        return
    if choice not in ("layer", "mlp"):
        raise ValueError(f"gradient_checkpointing={choice!r}: must be 'none', 'layer' or 'mlp'")
    model_type = model.config.model_type
    rates = {name: rate for name, rate in vars(model.config).items() if name.endswith("dropout") and rate}
    if rates:
        raise ValueError(f"{model_type}: gradient checkpointing needs {', '.join(rates)} to be 0")
    if choice == "layer" and getattr(model.config, "num_kv_shared_layers", None):
        raise ValueError(
            f"{model_type}: the last {model.config.num_kv_shared_layers} layers read keys and values of earlier ones, "
            "which a layer computed again would not differentiate; use gradient_checkpointing=mlp"
        )
    if choice == "mlp":
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers or not all(hasattr(layer, "mlp") for layer in layers):
            raise ValueError(f"{model_type}: a decoder layer has no module named mlp; use gradient_checkpointing=layer")
        for layer in layers:
            mlp: Any = layer.mlp
            mlp.gradient_tokens = None
            mlp.forward = partial(_mlp_forward, mlp, mlp.forward)
    model.enable_input_require_grads()
    set_function: Callable[..., None] = model._set_gradient_checkpointing
    set_function(enable=True, gradient_checkpointing_func=checkpoint_layer if choice == "layer" else checkpoint_mlp)
