"""Batches of other trainers as flat trajectories, so that a common prompt is forwarded once (docs/integrations.md)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from atpo_fast.packing.flat.batch import Trajectories


def trl_batch(inputs: Mapping[str, Tensor]) -> Trajectories:
    """Read what TRL's `GRPOTrainer` hands to its loss (TRL 1.16): prompt_*, completion_*, tool_mask, advantages, ...

    Prompts (B, P) are padded on the left, completions (B, T) on the right; advantages are (B,) or (B, T). Without
    `old_per_token_logps` the old log-probs are 0: set `row.old_logprob = None` on the packed rows, which is what TRL
    means. Give the inputs of all micro-batches of an optimizer step, joined: a mean over them is one over the batch.
    """
    prompts, mask = inputs["prompt_mask"], inputs["completion_mask"]
    action = mask * inputs.get("tool_mask", torch.ones_like(mask))
    old = inputs.get("old_per_token_logps")
    return _trajectories(
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([prompts, mask], 1),
        action,
        inputs["advantages"],
        torch.zeros(mask.shape) if old is None else old,
    )


def verl_batch(batch: Mapping[str, Tensor]) -> Trajectories:
    """Read what verl keeps in `DataProto.batch` (verl 0.9.1): input_ids, attention_mask, response_mask, advantages, ...

    `input_ids` are (B, P+T), the response the last T; `response_mask`, `old_log_probs` and `advantages` are (B, T).
    """
    return _trajectories(
        batch["input_ids"], batch["attention_mask"], batch["response_mask"], batch["advantages"], batch["old_log_probs"]
    )


def _trajectories(
    ids: Tensor,  # (B, P+T)
    real: Tensor,  # (B, P+T)
    action: Tensor,  # (B, T)
    advantages: Tensor,  # (B,) or (B, T)
    old_logprobs: Tensor,  # (B, T)
) -> Trajectories:
    """Spread what is known of responses over whole rows, and bring all to the CPU."""
    before = ids.shape[1] - action.shape[1]

    def whole(response: Tensor) -> Tensor:  # (B, T) -> (B, P+T)
        return torch.nn.functional.pad(response, (before, 0)).cpu()

    return Trajectories(
        input_ids=ids.cpu(),
        attention_mask=real.cpu(),
        loss_mask=whole(action),
        advantages=advantages.cpu() if advantages.dim() == 1 else whole(advantages),
        old_logprobs=whole(torch.where(action.bool(), old_logprobs, 0.0)),
    )
