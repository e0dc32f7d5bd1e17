"""LM head and loss in one, in the forward of TRL's model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atpo_kernels.fused_module import FusedLinearTurnPolicyLoss
from atpo_kernels.hosts.plain import add_turn_loss
from atpo_kernels.hosts.trl import batches, options


def install(trainer: Any) -> None:
    """Put the loss into the forward of the trainer's model. Raises ValueError for what the fused loss does not have."""
    args, scale = trainer.args, trainer.beta
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    model = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
    config = model.config.get_text_config()
    scaled = [n for n in _SCALING if getattr(config, n, None) not in (None, 1.0)]
    found = {
        "use_bias_correction_kl=True with beta != 0": scale != 0 and args.use_bias_correction_kl,
        "cast_lm_head_to_fp32": args.cast_lm_head_to_fp32,
        f"scaled logits ({', '.join(scaled)})": bool(scaled),
    }
    options.refuse_all(trainer, [name for name, on in found.items() if on])
    loss = FusedLinearTurnPolicyLoss(
        beta=scale,
        epsilon_low=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        temperature=trainer.temperature,
        use_ref_model=scale != 0,
        loss_type=trainer.loss_type,
        max_completion_length=trainer.max_completion_length,
        importance_sampling_level=trainer.importance_sampling_level,
        delta=args.delta if trainer.loss_type not in ("sapo", "cispo") else None,
        sapo_temperature_pos=args.sapo_temperature_pos,
        sapo_temperature_neg=args.sapo_temperature_neg,
    )
    add_turn_loss(model, loss)


def turn_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:  # ()
    """Compute the loss of a micro-batch inside the model's forward, scaled as TRL's own."""
    mask = batches.loss_mask(inputs)
    ids, attention_mask = batches.whole_rows(inputs)
    count = options.averaging(trainer, inputs).denominator
    batch = {
        "selected_token_ids": inputs["completion_ids"],
        "attention_mask": mask,
        "advantages": batches.advantages(inputs),
        "old_per_token_logps": inputs.get("old_per_token_logps"),
        "ref_per_token_logps": inputs.get("ref_per_token_logps"),
        # the loss divides by the number of ranks
        "num_items_in_batch": None if count is None else count * trainer.accelerator.num_processes,
    }
    with trainer.accelerator.autocast():
        loss, metrics = model(input_ids=ids, attention_mask=attention_mask, turn_loss=batch)
    batches.log_metrics(trainer, {name: value for name, value in metrics.by_name.items() if name != "clip_ratio"})
    return loss / options.micro_batches(trainer)


def logprobs(
    trainer: Any, model: Any, input_ids: Tensor, attention_mask: Tensor, length: int, size: int | None = None, **_: Any
) -> tuple[Tensor, Tensor, None]:  # (B, P+T) each -> (B, T), (B, T)
    """Compute log-probs and entropies by the head that computes the loss, `size` rows at a time.

    Old log-probs of another head (TRL's runs in autocast's bfloat16) differ by more than AT2PO's clip range.
    """
    found, size = [], size or len(input_ids)
    for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
        with trainer.accelerator.autocast():
            found.append(model(input_ids=ids, attention_mask=mask, turn_loss={"selected_token_ids": ids[:, -length:]}))
    logprob, entropy = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logprob, entropy, None


_SCALING = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
