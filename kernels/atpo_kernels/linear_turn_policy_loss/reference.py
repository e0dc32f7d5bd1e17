"""Definition of `linear_turn_policy_loss`: the two references one after the other."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from atpo_kernels.linear_logprob.reference import linear_logprob_reference
from atpo_kernels.records import LinearTurnLoss
from atpo_kernels.turn_policy_loss.layout import LossArguments, loss_tokens
from atpo_kernels.turn_policy_loss.reference import evaluate_reference
from atpo_kernels.turn_policy_loss.torch_path import KnownGradient


def linear_turn_policy_loss_reference(
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (A,) int64
    bias: Tensor | None,  # (V,)
    temperature: float,
    arguments: LossArguments,  # its logprob and entropy are placeholders
    turn_offsets: Tensor,  # (N+1,)
) -> LinearTurnLoss:
    """Materialises (A, V); every gradient by autograd."""
    logprob, entropy = linear_logprob_reference(hidden, weight, targets, bias, temperature)
    seen, seen_entropy = logprob.detach(), entropy.detach()
    tokens = loss_tokens(arguments)
    old = seen if arguments.inputs.old_logprob is None else tokens.old_logprob
    tokens = replace(tokens, logprob=seen, old_logprob=old, entropy=seen_entropy)
    result = evaluate_reference(tokens, arguments.config, False)
    loss = result.loss
    if torch.is_grad_enabled():
        loss = KnownGradient.apply(loss, logprob, result.coef, entropy, result.entropy_slope)
    return LinearTurnLoss(loss, result.metrics, result.coef, seen, seen_entropy)
