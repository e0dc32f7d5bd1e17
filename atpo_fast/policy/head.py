"""The LM head as the place where the fused operators run (docs/design.md#head).

Keeping the operators inside a module's `forward` is what lets ZeRO-3 gather the weight before, release it after, and
collect its gradient; a partitioned weight never reaches a kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from atpo_fast.common.logits import LogitRule, logit_rule
from atpo_fast.objective import Objective
from atpo_fast.objective.objective import leaf_paths, token_weights
from atpo_fast.tree.packed_rows import PackedTrees
from atpo_kernels import linear_logprob, linear_turn_policy_loss


class RowLoss(NamedTuple):
    """Loss of one row; a plain tuple, so that DeepSpeed's hooks find its tensors."""

    loss: Tensor  # ()
    logprob: Tensor  # (A,) detached
    entropy: Tensor  # (A,) detached
    coef: Tensor  # (A,) d loss / d logprob, detached
    metrics: dict[str, Tensor]  # detached scalars


class PolicyHead(nn.Module):
    """The LM head in place of an `nn.Linear` to the vocabulary: the same parameters and names, another forward.

    Args:
        linear: the model's output embedding; its parameters are taken over (tied ones stay tied).
        temperature: divides the logits, once.
        rule: how the model makes its logits of the head's products; None: they are its logits.
    """

    def __init__(self, linear: nn.Linear, temperature: float = 1.0, rule: LogitRule | None = None):
        super().__init__()
        rule = rule or LogitRule()
        self.weight = linear.weight  # (V, D)
        self.bias = linear.bias  # (V,) or None
        self.temperature = temperature * rule.divisor
        self.softcap = None if rule.softcap is None else rule.softcap * rule.divisor

    def forward(
        self,
        hidden: Tensor,  # (A, D)
        row: PackedTrees | None = None,
        objective: Objective | None = None,
    ) -> tuple[Tensor, Tensor] | RowLoss | Tensor:
        """Compute (log-prob, entropy), each (A,), or the row's loss when an objective is given.

        Without a row the products (..., V) of the linear layer that this was, which the model's own forward asks for.
        """
        if row is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        options: dict[str, Any] = {"bias": self.bias, "temperature": self.temperature, "softcap": self.softcap}
        if objective is None:
            return linear_logprob(hidden, self.weight, row.targets, **options)
        out = linear_turn_policy_loss(
            hidden,
            self.weight,
            row.targets,
            row.old_logprob,
            **options,
            turn_offsets=row.turn_offsets,
            weights=token_weights(row),
            paths=leaf_paths(row),
            ref_logprob=row.ref_logprob,
            rollout_logprob=row.rollout_logprob,
            reduction="sum",
            clip_low=row.clip_low,
            clip_high=row.clip_high,
            config=objective.loss_config,
        )
        return RowLoss(out.loss, out.logprob, out.entropy, out.coef, out.metrics)


def install_head(model: PreTrainedModel, temperature: float) -> PolicyHead:
    """Swap the `lm_head` of a Hugging Face causal LM for a `PolicyHead`, and return it.

    Raises TypeError for a head that is not linear, or has an adapter: the fused operators take one weight.
    """
    linear = model.lm_head
    if not isinstance(linear, nn.Linear):
        kind = f"{type(linear).__module__}.{type(linear).__name__}"
        advice = "; leave lm_head out of target_modules and modules_to_save" if kind.startswith("peft.") else ""
        raise TypeError(f"lm_head is a {kind}; expected torch.nn.Linear{advice}")
    head = PolicyHead(linear, temperature, logit_rule(model.config))
    model.lm_head = head
    return head
