"""OpenRLHF: `TurnPolicyLoss` in the place of its `PolicyLoss`. Tested with OpenRLHF 0.11.2, which has no registry.

from atpo_kernels.hosts.openrlhf import install
install()  # in the process that makes the policy actor; --actor.eps_clip_low_high 0.003 0.004
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from atpo_kernels.choices import RatioLevel
from atpo_kernels.turn_policy_loss import turn_policy_loss


class TurnPolicyLoss(nn.Module):
    """The turn loss with the constructor and forward of OpenRLHF's `PolicyLoss`.

    `level` is the ratio's; policy_loss_type "gspo" sets it to "sequence". Raises ValueError for a correction of the
    rollout's log-probs (is_correction_level other than "off").
    """

    def __init__(
        self,
        clip_eps_low: float = 3e-3,
        clip_eps_high: float = 4e-3,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        level: RatioLevel = "turn",
        **correction: Any,
    ):
        super().__init__()
        if is_correction_level != "off":
            raise ValueError(f"TurnPolicyLoss does not have is_correction_level={is_correction_level!r}: use 'off'")
        sequence = policy_loss_type == "gspo"
        self.by_token = token_level_loss and not sequence
        self.terms: dict[str, Any] = {"level": "sequence" if sequence else level, "dual_cap": dual_clip}
        self.terms |= {"clip_low": clip_eps_low, "clip_high": clip_eps_high}
        self.terms["reduction"] = "token-mean" if self.by_token else "seq-mean-token-mean"

    def forward(
        self,
        log_probs: Tensor,  # (B, T)
        old_log_probs: Tensor,  # (B, T)
        advantages: Tensor,  # (B, T)
        action_mask: Tensor | None = None,  # (B, T)
        rollout_log_probs: Tensor | None = None,  # (B, T)
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Return (loss, clip_ratio, ppo_kl, None, None); counts of the whole batch take the place of this part's."""
        mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask.bool()
        whole = batch_num_tokens if self.by_token else global_batch_size
        here = (mask if self.by_token else mask.any(1)).sum().clamp(min=1)  # rows without action tokens do not count
        count = here if whole is None else whole / dp_size
        out = turn_policy_loss(log_probs, old_log_probs, advantages, mask=mask, denominator=count, **self.terms)
        kl = torch.where(mask, old_log_probs - log_probs.detach(), 0).sum() / mask.sum().clamp(min=1)
        return out.loss, out.metrics["clipped_low"] + out.metrics["clipped_high"], kl, None, None


def install() -> None:
    """Let policy actors that this process makes use the turn loss; Ray's workers are processes of their own."""
    from openrlhf.trainer.ray import ppo_actor

    ppo_actor.PolicyLoss = TurnPolicyLoss


def check() -> None:
    """Raise TypeError unless `forward` takes the arguments of OpenRLHF's `PolicyLoss`."""
    from openrlhf.models.loss import PolicyLoss

    if missing := signature(PolicyLoss.forward).parameters.keys() - signature(TurnPolicyLoss.forward).parameters.keys():
        raise TypeError(f"TurnPolicyLoss lacks OpenRLHF's arguments {', '.join(sorted(missing))}")
