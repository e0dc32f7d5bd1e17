"""The policy loss in vectorised PyTorch, any device, no host sync."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atpo_kernels.records import LossConfig
from atpo_kernels.turn_policy_loss.layout import LossArguments, loss_tokens
from atpo_kernels.turn_policy_loss.terms import TokenTerms, approximate_kl, token_terms
from atpo_kernels.turn_policy_loss.tokens import LossTokens


@dataclass(slots=True)
class Evaluation:
    """Loss and exact derivatives, detached, by token of the line."""

    loss: Tensor  # () or, by token, (A,)
    coef: Tensor  # (A,) d loss / d logprob
    entropy_slope: Tensor | None  # (A,) d loss / d entropy
    metrics: dict[str, Tensor]


@torch.no_grad()
def turn_policy_loss_torch(arguments: LossArguments) -> Evaluation:
    """See `turn_policy_loss`."""
    return evaluate(loss_tokens(arguments), arguments.config, arguments.by_token)


def evaluate(tokens: LossTokens, config: LossConfig, by_token: bool) -> Evaluation:
    """Loss (its sum, or by token), derivatives and metrics of a line of tokens."""
    terms = token_terms(tokens, config)
    loss = terms.value if by_token else terms.value.sum()
    return Evaluation(loss, terms.coef, terms.entropy_slope, loss_metrics(tokens, terms, config))


def loss_metrics(tokens: LossTokens, terms: TokenTerms, config: LossConfig) -> dict[str, Tensor]:
    """0-dim tensors; means over the tokens with W0 > 0, whose number is `tokens`. See `turn_policy_loss`."""
    counted = tokens.weights.all > 0
    ones = counted.to(terms.value.dtype)
    total = ones.sum()

    def mean(values: Tensor) -> Tensor:
        return torch.where(counted, values, 0).sum() / total.clamp_min(1)

    in_turn = ones.new_zeros(tokens.num_turns).index_add_(0, tokens.turn, ones)
    ratio = torch.where(counted, terms.ratio, 0)
    metrics = {
        "clip_low": mean(terms.cut_low),
        "clip_high": mean(terms.cut_high),
        "approx_kl": mean(approximate_kl(tokens.logprob - tokens.old_logprob, config)),
        "ratio_mean": mean(terms.ratio),
        "ratio_max": ratio.amax() if ratio.numel() else total.clone(),
        "turns": (in_turn > 0).sum().to(total.dtype),
        "tokens": total,
    }
    if tokens.entropy is not None:
        metrics["entropy"] = mean(tokens.entropy)
    if terms.kl is not None:
        metrics["ref_kl"] = mean(terms.kl)
    return metrics


class KnownGradient(torch.autograd.Function):
    """A loss whose gradients by logprob and entropy are already known."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, loss: Tensor, logprob: Tensor, coef: Tensor, entropy: Tensor | None, entropy_slope: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(coef, entropy_slope)
        ctx.dtypes = (logprob.dtype, None if entropy is None else entropy.dtype)
        return loss.clone()  # a view could not be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        coef, entropy_slope = ctx.saved_tensors
        by_logprob = (grad * coef).to(ctx.dtypes[0]) if ctx.needs_input_grad[1] else None
        wanted = ctx.needs_input_grad[3] and entropy_slope is not None
        return None, by_logprob, None, (grad * entropy_slope).to(ctx.dtypes[1]) if wanted else None, None
