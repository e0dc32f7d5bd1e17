"""Auxiliary losses of mixtures of experts, on the tokens of packed rows (docs/supported_models.md#mixtures-of-experts).

A layer's balance over n tokens is E * sum_e f_e P_e (arXiv:2101.03961). E is the number of experts; f_e is the number
of tokens that go to expert e, over n, and has no gradient; P_e is the mean probability that the router gives e. The
z-loss is the mean square of the logsumexp of the router's logits (arXiv:2202.08906).

Their gradients enter the backward at the router itself, beside those of the scores that it hands to the experts, and
not at the loss: so they are right in layers that the backward computes again, and in rows that are opened and closed.
The loss of the row, whose gradient arrives first, brings the factor by which all of it is scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atpo_fast.common.ranks import reduce_over_ranks
from atpo_fast.tree.packed_rows import PackedTrees

_ROUTER = "TopKRouter"  # how transformers ends the names of routers that return logits, scores and experts


class RouterLoss:
    """The balance and the z-loss of all routers of a model, averaged over layers and over the tokens of a mini-batch.

    f_e is taken over the row, as transformers takes it over the micro-batch. A row's part counts by its share of the
    mini-batch's unique tokens.

    Args:
        model: its routers are followed from now on.
        balance: weight of the balance.
        z: weight of the z-loss.

    Raises:
        ValueError: the model's architecture has no such losses in transformers.

    Attributes:
        total: () sum of the losses whose backward has run since `begin`, weighted.
    """

    def __init__(self, model: PreTrainedModel, balance: float, z: float) -> None:
        routers = [module for module in model.modules() if type(module).__name__.endswith(_ROUTER)]
        if not routers or not hasattr(model.config, "router_aux_loss_coef"):
            raise ValueError(
                f"{model.config.model_type}: transformers has no auxiliary loss for its routers, if it has any: leave "
                "model.router_balance_coef and model.router_z_coef at 0"
            )
        self.balance, self.z = balance, z
        self.total = torch.zeros((), dtype=torch.float64)
        self._layers, self._tokens = len(routers), 0.0
        self._share = 0.0  # of the row in the mini-batch
        self._scale: Tensor | float = 0.0  # gradient of the row's loss
        for router in routers:
            router.register_forward_hook(self._follow)

    def begin(self, rows: Sequence[PackedTrees]) -> None:
        """Begin a mini-batch of which a rank has these rows; a collective where there are ranks."""
        tokens = torch.tensor([sum(row.unique_tokens for row in rows)], dtype=torch.float64)
        self._tokens = max(float(reduce_over_ranks(tokens)), 1.0)
        self.total = torch.zeros((), dtype=torch.float64)

    def attach(self, row: PackedTrees, loss: Tensor) -> None:
        """Let the backward of a row's loss () bring the gradients of its routers' losses."""
        share = row.unique_tokens / self._tokens / self._layers

        def arrived(gradient: Tensor) -> None:
            self._share, self._scale = share, gradient * share

        if loss.requires_grad:
            loss.register_hook(arrived)

    def _follow(self, router: nn.Module, inputs: Any, out: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        (chosen,) = (x for x in out if not x.is_floating_point())  # (n, k)
        (scores,) = (x for x in out if x.is_floating_point() and x.shape == chosen.shape)
        (logits,) = (x for x in out if x is not scores and x is not chosen)  # (n, E)
        if not scores.requires_grad:
            return None
        attached = _Beside.apply(scores, self._loss(logits, chosen), self)
        return tuple(attached if x is scores else x for x in out)

    def _loss(self, logits: Tensor, chosen: Tensor) -> Tensor:  # (n, E), (n, k) -> ()
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        count = wide.shape[1]
        share = nn.functional.one_hot(chosen, count).sum(1).to(wide.dtype).mean(0)  # (E,)
        balance = count * (share * wide.softmax(-1).mean(0)).sum()
        return self.balance * balance + self.z * wide.logsumexp(-1).square().mean()

    def arrive(self, loss: Tensor) -> Tensor:
        """Count a router's loss (), whose gradient is wanted now; returns that, ()."""
        self.total = self.total + self._share * loss.to("cpu", torch.float64)
        return torch.as_tensor(self._scale, dtype=loss.dtype, device=loss.device)


class _Beside(torch.autograd.Function):
    """The scores unchanged; in the backward the gradient of the losses goes into them."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, loss: Tensor, losses: RouterLoss) -> Tensor:  # type: ignore[override]
        ctx.losses = losses
        ctx.save_for_backward(loss)
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        (loss,) = ctx.saved_tensors
        return gradient, ctx.losses.arrive(loss), None
