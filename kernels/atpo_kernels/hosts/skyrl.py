"""SkyRL: policy loss, registered by `register()` before the trainer starts. Tested with SkyRL 0.3.0.

from atpo_kernels.hosts.skyrl import register
register()  # then trainer.algorithm.policy_loss_type=at2po, eps_clip_low=0.003, eps_clip_high=0.004
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from atpo_kernels.turn_policy_loss import turn_policy_loss

LOSS = "at2po"


def policy_loss(
    log_probs: Tensor,  # (B, T)
    old_log_probs: Tensor,  # (B, T)
    advantages: Tensor,  # (B, T)
    config: Any,
    loss_mask: Tensor | None = None,  # (B, T)
    rollout_logprobs: Tensor | None = None,  # (B, T)
    **terms: Any,
) -> tuple[Tensor, dict[str, float]]:
    """Compute the turn loss of a micro-batch, by SkyRL's own off-policy correction and sum.

    SkyRL's advantages already hold the mean over the mini-batch. The clip range is config.eps_clip_low and
    eps_clip_high (SkyRL's defaults are 0.2). `terms` are fields of `LossConfig`, for a loss of your own:
    `functools.partial(policy_loss, level="token")`.
    """
    from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import apply_off_policy_correction
    from skyrl.backends.skyrl_train.utils.ppo_utils import reduce_loss

    terms = {"clip_low": config.eps_clip_low, "clip_high": config.eps_clip_high} | terms
    out = turn_policy_loss(log_probs, old_log_probs, advantages, mask=loss_mask, reduction="none", **terms)
    loss, loss_mask, metrics = apply_off_policy_correction(
        out.loss, old_log_probs, rollout_logprobs, loss_mask, config.off_policy_correction
    )
    found = {name: value.item() for name, value in out.metrics.items()}
    metrics |= found | {"clip_ratio": found["clipped_low"] + found["clipped_high"]}
    return reduce_loss(loss, loss_mask), metrics


def register() -> None:
    """Register the loss with SkyRL, under the name "at2po"; once, however often it is called."""
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry, register_policy_loss

    if LOSS not in PolicyLossRegistry.list_available():
        register_policy_loss(LOSS)(policy_loss)


def check() -> None:
    """Raise unless SkyRL takes the loss."""
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry

    register()
    PolicyLossRegistry.get(LOSS)
