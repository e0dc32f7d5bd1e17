"""What the turn loss reads from TRL's batches, and what it logs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atpo_kernels.arguments import Averaging
from atpo_kernels.tokens import padded_shares, turn_sizes, turns_from_mask

TRL_NAMES = {"clipped_low": "clip_ratio/low_mean", "clipped_high": "clip_ratio/high_mean", "ref_kl": "kl"}
"""Metrics that TRL has a name for, beside entropy."""


def loss_mask(inputs: dict[str, Any]) -> Tensor:  # (B, T)
    """Mark the tokens that the policy wrote. Raises ValueError for a batch with images."""
    if inputs.get("pixel_values") is not None:
        raise ValueError("the turn loss does not have images, but the batch holds pixel_values: use TRL's GRPOTrainer")
    return inputs["completion_mask"] * inputs.get("tool_mask", 1)


def whole_rows(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:  # (B, P+T) each
    """Join prompts and completions: token ids and attention mask."""
    ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    return ids, mask


def advantages(inputs: dict[str, Any]) -> Tensor:  # (B,) or (B, T)
    """Multiply the advantages by the importance weights of vLLM's samples, in whose size the loss is linear."""
    given, trust = inputs["advantages"], inputs.get("importance_sampling_ratio")
    if trust is None:
        return given
    return (given if given.dim() == 2 else given[:, None]) * trust.expand_as(inputs["completion_ids"])


def corrected_kl(
    logprob: Tensor,  # (B, T)
    inputs: dict[str, Any],
    mask: Tensor,  # (B, T) bool
    averaging: Averaging,
    level: str,
) -> tuple[Tensor, Tensor]:  # () each
    """Compute the k3 KL to the reference, weighted by the ratio (`use_bias_correction_kl`): (mean, mean by token)."""
    old = inputs.get("old_per_token_logps")
    gap = torch.where(mask, inputs["ref_per_token_logps"] - logprob, 0)
    log_ratio = torch.where(mask, logprob - (logprob.detach() if old is None else old), 0)
    turn = turns_from_mask(mask)
    if level != "token":
        row = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
        group = turn if level == "turn" else row
        sums = log_ratio.new_zeros(mask.numel()).index_add(0, group.flatten(), log_ratio.flatten())
        log_ratio = sums[group] / turn_sizes(mask.to(logprob.dtype), group, mask.numel())
    kl = torch.where(mask, (gap.exp() - gap - 1) * log_ratio.exp(), 0)
    share = padded_shares(mask, turn, *averaging, logprob.dtype)
    return (kl * share).sum(), kl.detach().sum() / mask.sum().clamp(min=1)


def log_metrics(trainer: Any, metrics: dict[str, Tensor]) -> None:  # () each
    """Average over ranks, by tokens, and log under TRL's names where it has one, else as turn/*."""
    rows = trainer.accelerator.gather(torch.stack([x.float() for x in metrics.values()])[None])
    tokens = rows[:, list(metrics).index("tokens")]
    log = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, values in zip(metrics, rows.unbind(1), strict=True):
        mean = (values * tokens).sum() / tokens.sum().clamp(min=1)
        whole = {"ratio_max": values.max(), "turns": values.sum(), "tokens": values.sum()}
        ours = name if name == "entropy" else f"turn/{name}"
        log[TRL_NAMES.get(name, ours)].append(whole.get(name, mean).item())
