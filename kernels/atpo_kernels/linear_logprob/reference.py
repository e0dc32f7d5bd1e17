"""Definition of `linear_logprob` in plain PyTorch, which materialises the (A, V) logits.

Tests and benches compare with it; its gradients are those of autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from atpo_kernels.records import HeadOptions


def linear_logprob_reference(
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (A,) int64
    bias: Tensor | None,  # (V,)
    options: HeadOptions,
) -> tuple[Tensor, Tensor]:  # (A,), (A,)
    """Compute log-prob of the targets and entropy of the softmax of the logits of `hidden @ weight.T + bias`."""
    statistics_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = F.linear(hidden, weight, bias).to(statistics_dtype)
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    logits = logits / options.temperature
    logprob = logits.log_softmax(-1)
    entropy = -(logprob.exp() * logprob).sum(-1)
    return logprob.gather(-1, targets[:, None]).squeeze(-1), entropy
