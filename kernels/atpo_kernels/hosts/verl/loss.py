"""The turn loss with the signature of verl's policy losses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from atpo_kernels.turn_policy_loss import turn_policy_loss


def policy_loss(
    old_log_prob: Tensor,  # (B, T)
    log_prob: Tensor,  # (B, T)
    advantages: Tensor,  # (B, T)
    response_mask: Tensor,  # (B, T)
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,  # (B, T)
    **terms: Any,
) -> tuple[Tensor, dict[str, float]]:
    """Compute the turn loss as `core_algos.agg_loss` averages it: over all micro-batches and ranks, where verl says so.

    The clip range is config.clip_ratio_low and clip_ratio_high (verl's default is 0.2), AT2PO's without a config.
    `terms` are fields of `LossConfig`, for a loss of your own: `functools.partial(policy_loss, level="token")`.
    """
    if config is not None:
        terms = {"clip_low": config.clip_ratio_low, "clip_high": config.clip_ratio_high} | terms
    if rollout_is_weights is not None:  # the loss is linear in the size of an advantage
        advantages = advantages * rollout_is_weights
    info = {} if config is None else config.global_batch_info
    ranks = info.get("dp_size") or 1  # gradients are averaged over ranks
    count = info.get("batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size")
    if count is None and ranks > 1 and loss_agg_mode != "token-sum":
        raise ValueError(f"loss_agg_mode={loss_agg_mode!r} on {ranks} ranks needs the counts of the whole batch")
    if count is None and loss_agg_mode.startswith("seq-"):
        count = response_mask.any(1).sum().clamp(min=1)  # verl leaves rows without action tokens out
    total = loss_agg_mode == "token-sum"
    out = turn_policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        mask=response_mask,
        reduction="sum" if total else loss_agg_mode,  # type: ignore[arg-type]
        denominator=None if count is None or total else count / ranks,
        max_length=info.get("loss_scale_factor"),
        **terms,
    )
    return out.loss * (ranks if total else 1), {f"actor/{name}": x.item() for name, x in out.metrics.items()}
