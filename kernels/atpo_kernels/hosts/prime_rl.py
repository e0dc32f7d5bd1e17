"""prime-rl: the function that `trainer.loss` names. Written against prime-rl at commit 559b447 (not on PyPI).

[trainer.loss]
type = "custom"
import_path = "atpo_kernels.hosts.prime_rl.loss"
kwargs = { clip_low = 0.003, clip_high = 0.004 }
"""

from __future__ import annotations

from typing import Any

from atpo_kernels.turn_policy_loss import turn_policy_loss


def loss(inputs: Any, **terms: Any) -> Any:
    """Add up the turn loss of one sample; prime-rl divides by the tokens of all samples and ranks.

    Old log-probs are the engine's, as in prime-rl's own loss. `loss_weights` scale the advantages. `terms` are fields
    of `LossConfig`; left out, they are AT2PO's. Returns prime-rl's `LossOutputs`.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    advantages = inputs.advantages
    if inputs.loss_weights is not None:  # the loss is linear in the size of an advantage
        advantages = advantages * inputs.loss_weights
    out = turn_policy_loss(
        inputs.trainer_logprobs,
        inputs.inference_logprobs,
        advantages,
        mask=inputs.loss_mask,
        reduction="sum",
        **terms,
    )
    return LossOutputs(loss=out.loss, metrics=out.metrics)
