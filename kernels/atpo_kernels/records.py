"""Records shared by the loss operators: what a policy loss is made of, and what it returns (design, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

RatioLevel = Literal["token", "turn", "sequence"]
ClipMode = Literal["hard", "dual", "soft", "soft_high", "sapo", "cispo"]
KLMode = Literal["none", "k1", "k2", "k3", "low_var"]
Reduction = Literal[
    "seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "turn-mean", "sum", "none"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The per-token policy loss, without how tokens are averaged."""

    level: RatioLevel = "turn"
    """Over what the log-ratio is averaged before it is exponentiated."""
    clip: ClipMode = "hard"
    """hard: PPO. dual: PPO with the loss of A<0 capped at dual_cap*|A|. soft: gradient kept outside the range at the
    bound's value (GPPO). soft_high: soft above, hard below (AEPO). sapo: sigmoid gate. cispo: stop-gradient clip."""
    clip_low: float = 3e-3
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 4e-3
    """The ratio is clipped above at 1 + clip_high."""
    dual_cap: float = 3.0
    """c of the dual clip; greater than 1."""
    sapo_tau_pos: float = 1.0
    """Temperature of the sapo gate where A > 0."""
    sapo_tau_neg: float = 1.05
    """Temperature of the sapo gate where A < 0."""
    max_log_ratio: float = 10.0
    """The averaged log-ratio is capped here before it is exponentiated."""
    kl: KLMode = "none"
    """Estimator of the KL to the reference policy."""
    kl_coef: float = 0.0
    """Weight of the KL term."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus (subtracted from the loss)."""
    importance_cap: float | None = None
    """Truncated importance weights min(exp(old - rollout), cap) on the policy term; None: off."""

    def __post_init__(self) -> None:
        for name, allowed in (("level", RatioLevel), ("clip", ClipMode), ("kl", KLMode)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(get_args(allowed))}")
        if self.clip_low < 0 or self.clip_high < 0:
            raise ValueError(f"clip_low and clip_high must not be negative, got {self.clip_low} and {self.clip_high}")
        if self.dual_cap <= 1:
            raise ValueError(f"dual_cap must be greater than 1, got {self.dual_cap}")
        if self.sapo_tau_pos <= 0 or self.sapo_tau_neg <= 0:
            raise ValueError("sapo_tau_pos and sapo_tau_neg must be positive")
        if self.importance_cap is not None and self.importance_cap <= 0:
            raise ValueError(f"importance_cap must be positive, got {self.importance_cap}")

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probs are read."""
        return self.kl != "none" and self.kl_coef != 0

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss has a gradient through the entropy."""
        return self.entropy_coef != 0


@dataclass(slots=True)
class TokenWeights:
    """Weights of the de-duplicated loss, one per action token."""

    pos: Tensor  # (A,) W+
    neg: Tensor  # (A,) W-
    all: Tensor  # (A,) W0


@dataclass(slots=True)
class LeafPaths:
    """Trajectories through packed turns: what level `sequence` needs beside the tokens."""

    offsets: Tensor  # (S+1,) int32 CSR over P
    turns: Tensor  # (P,) int32 index of a turn in turn_offsets
    weight_pos: Tensor  # (P,) per-token w * max(A, 0) of the trajectory in the turn
    weight_neg: Tensor  # (P,) per-token w * max(-A, 0)


class HeadInputs(NamedTuple):
    """What an LM head is differentiated by, or the gradients; None where there is none."""

    hidden: Tensor | None  # (A, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)


@dataclass(slots=True)
class TurnLoss:
    """What a policy loss returns."""

    loss: Tensor  # () differentiable in logprob (and entropy); (A,) or (B, T) with reduction="none"
    metrics: dict[str, Tensor]  # detached device scalars; see turn_policy_loss
    coef: Tensor  # (A,) or (B, T): d loss / d logprob, detached


@dataclass(slots=True)
class LinearTurnLoss(TurnLoss):
    """What `linear_turn_policy_loss` returns: the gradients of the LM head's inputs hang on `loss`."""

    logprob: Tensor  # (A,) log-probs of the targets, detached
    entropy: Tensor  # (A,) entropies in nats, detached
