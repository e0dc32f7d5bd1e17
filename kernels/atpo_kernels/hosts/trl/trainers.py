"""The two trainers and their configuration, made from TRL's classes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from atpo_kernels.hosts.trl import batches, fused, options
from atpo_kernels.turn_policy_loss import turn_policy_loss


@functools.cache
def classes() -> dict[str, type]:
    """Import TRL and make the classes, by name."""
    from trl import GRPOConfig, GRPOTrainer

    @dataclass
    class TurnGRPOConfig(GRPOConfig):
        """`GRPOConfig` with AT2PO's loss as the default."""

        importance_sampling_level: str = "turn"
        loss_type: str = "grpo"
        epsilon: float = 3e-3
        epsilon_high: float | None = 4e-3

    class TurnGRPOTrainer(GRPOTrainer):
        """`GRPOTrainer` whose ratio may be that of a turn. Raises ValueError for options that it does not have."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            options.refuse(self)

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            return turn_loss(self, model, inputs)

    class FusedTurnGRPOTrainer(TurnGRPOTrainer):
        """The same with LM head and loss in one, in the forward of the model (`atpo_kernels.hosts.plain`)."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            fused.install(self)

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            return fused.turn_loss(self, model, inputs)

        def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            if model is self.ref_model:
                return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            return fused.logprobs(self, model, *args, **kwargs)

    made: dict[str, type] = {c.__name__: c for c in (TurnGRPOConfig, TurnGRPOTrainer, FusedTurnGRPOTrainer)}
    for name, found in made.items():  # checkpoints pickle the configuration, by the name that users import
        found.__module__, found.__qualname__ = "atpo_kernels.hosts.trl", name
    return made


def turn_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:  # ()
    """Compute the loss of a micro-batch, scaled as TRL's own, so that those of an optimizer step add up."""
    mask = batches.loss_mask(inputs)
    ids, attention_mask = batches.whole_rows(inputs)
    logprob, entropy, _ = trainer._get_per_token_logps_and_entropies(
        model, ids, attention_mask, mask.size(1), compute_entropy=True
    )
    averaging = options.averaging(trainer, inputs)
    terms = {"mask": mask, "entropy": entropy.detach(), **averaging._asdict(), **options.policy_terms(trainer)}
    corrected = trainer.beta != 0 and trainer.args.use_bias_correction_kl
    if trainer.beta and not corrected:
        terms |= {"kl": "k3", "kl_coef": trainer.beta, "ref_logprob": inputs["ref_per_token_logps"]}
    out = turn_policy_loss(logprob, inputs.get("old_per_token_logps"), batches.advantages(inputs), **terms)
    loss, metrics = out.loss, out.metrics
    if corrected:
        kl, metrics["ref_kl"] = batches.corrected_kl(logprob, inputs, mask.bool(), averaging, terms["level"])
        loss = loss + trainer.beta * kl
    batches.log_metrics(trainer, metrics)
    return loss / options.micro_batches(trainer)
