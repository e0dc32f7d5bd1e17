"""Definition of `linear_turn_policy_loss`: the references of the two operators, one after the other."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from atpo_kernels.arguments import LossArguments
from atpo_kernels.autograd import attach_gradients
from atpo_kernels.linear_logprob.reference import linear_logprob_reference
from atpo_kernels.records import HeadOptions, LinearTurnLoss
from atpo_kernels.tokens import loss_tokens
from atpo_kernels.turn_policy_loss.reference import evaluate_reference


def linear_turn_policy_loss_reference(
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (A,) int64
    bias: Tensor | None,  # (V,)
    options: HeadOptions,
    arguments: LossArguments,  # its logprob and entropy are placeholders
    turn_offsets: Tensor,  # (N+1,)
) -> LinearTurnLoss:
    """Compute `linear_turn_policy_loss` by its definition: materialises (A, V), every gradient by autograd."""
    logprob, entropy = linear_logprob_reference(hidden, weight, targets, bias, options)
    seen, seen_entropy = logprob.detach(), entropy.detach()
    tokens = loss_tokens(arguments)
    old = seen if arguments.inputs.old_logprob is None else tokens.old_logprob
    tokens = replace(tokens, logprob=seen, old_logprob=old, entropy=seen_entropy)
    result = evaluate_reference(tokens, arguments.config, False)
    loss = result.loss
    if torch.is_grad_enabled():
        loss = attach_gradients(loss, (logprob, entropy), (result.grad_logprob, result.grad_entropy))
    return LinearTurnLoss(loss, result.metrics, result.grad_logprob, seen, seen_entropy)
