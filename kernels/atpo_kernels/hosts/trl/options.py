"""What TRL's options mean for the turn loss, and which it does not have."""

from __future__ import annotations

from typing import Any

from atpo_kernels.arguments import Averaging
from atpo_kernels.choices import LOSS_TYPES, MEAN_OVER_STEP


def refuse(trainer: Any) -> None:
    """Raise ValueError, naming them, for options of TRL that the turn loss does not have."""
    delta, least = trainer.args.delta, 1 + trainer.epsilon_high
    found = {
        f"loss_type={trainer.loss_type!r}": trainer.loss_type not in LOSS_TYPES,
        f"top_entropy_quantile={trainer.top_entropy_quantile}": trainer.top_entropy_quantile < 1,
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
        "entropy_coef or use_adaptive_entropy": trainer._entropy_bonus_enabled,
        "router_aux_loss_coef (mixture of experts)": trainer.aux_loss_enabled,
        f"delta={delta}, below the upper bound of the ratio, {least:g}": delta is not None and delta < least,
    }
    refuse_all(trainer, [name for name, on in found.items() if on])


def refuse_all(trainer: Any, names: list[str]) -> None:
    """Raise ValueError for the named options, if there are any."""
    if names:
        raise ValueError(f"{type(trainer).__name__} does not have {'; '.join(names)}. Use TRL's GRPOTrainer for that")


def policy_terms(trainer: Any) -> dict[str, Any]:
    """Translate clip and ratio level into fields of `LossConfig`."""
    args, level = trainer.args, {"level": trainer.importance_sampling_level}
    if trainer.loss_type == "sapo":
        tau = {"sapo_tau_pos": args.sapo_temperature_pos, "sapo_tau_neg": args.sapo_temperature_neg}
        return {"clip": "sapo", **tau, **level}
    if trainer.loss_type == "cispo":  # epsilon_high is the bound itself, and there is no lower one
        return {"clip": "cispo", "clip_low": 1.0, "clip_high": trainer.epsilon_high - 1, **level}
    return {"clip_low": trainer.epsilon_low, "clip_high": trainer.epsilon_high, "dual_cap": args.delta, **level}


def averaging(trainer: Any, inputs: dict[str, Any]) -> Averaging:
    """Say how TRL averages, with the number of tokens of an optimizer step for dapo and cispo.

    `num_items_in_batch` counts the action tokens of a generation batch on all ranks; gradients are averaged over ranks.
    """
    count = None
    if trainer.loss_type in MEAN_OVER_STEP:
        count = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        if trainer.model.training:
            count = count * trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation
    return Averaging(LOSS_TYPES[trainer.loss_type], trainer.max_completion_length, count)


def micro_batches(trainer: Any) -> float:
    """Return the number of micro-batches that an optimizer step averages; 1 where the denominator counts them."""
    if trainer.loss_type in MEAN_OVER_STEP or not trainer.model.training:
        return 1
    return trainer.current_gradient_accumulation_steps
