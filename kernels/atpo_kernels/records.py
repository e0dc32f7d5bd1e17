"""Records that the loss operators take and return: configuration, weights, paths, losses (docs/design.md#objective)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from atpo_kernels.choices import ClipFamily, KLEstimator, RatioLevel, check_choice


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Configuration of the loss of one token; how tokens are averaged is not part of it."""

    level: RatioLevel = "turn"
    """Tokens over which the log-ratio is averaged before it is exponentiated."""
    clip: ClipFamily = "hard"
    """Clip family. hard: PPO. soft: gradient kept outside the range at the bound's value (GPPO). soft_high: soft above,
    hard below (AEPO). sapo: sigmoid gate. cispo: the clipped ratio is a constant weight of the log-prob."""
    clip_low: float = 3e-3
    """Distance of the lower bound: the ratio is clipped below at 1 - clip_low."""
    clip_high: float = 4e-3
    """Distance of the upper bound: the ratio is clipped above at 1 + clip_high."""
    dual_cap: float | None = None
    """Cap c of the dual clip, greater than 1, beside any family: where A < 0 and the ratio is greater than c, the loss
    is c*|A|, a constant without gradient. None: no cap."""
    sapo_tau_pos: float = 1.0
    """Temperature of the sapo gate where A > 0."""
    sapo_tau_neg: float = 1.05
    """Temperature of the sapo gate where A < 0."""
    max_log_ratio: float = 10.0
    """Cap of the averaged log-ratio before it is exponentiated. Over the cap the ratio is constant: no gradient."""
    kl: KLEstimator = "none"
    """Estimator of the KL to the reference policy."""
    kl_coef: float = 0.0
    """Weight of the KL term."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus (subtracted from the loss)."""
    importance_cap: float | None = None
    """Cap of the truncated importance weights min(exp(old - rollout), cap) on the policy term; None: no weights."""

    def __post_init__(self) -> None:
        check_choice("level", self.level, RatioLevel)
        check_choice("clip", self.clip, ClipFamily)
        check_choice("kl", self.kl, KLEstimator)
        if self.clip_low < 0 or self.clip_high < 0:
            raise ValueError(f"clip_low and clip_high must not be negative, got {self.clip_low} and {self.clip_high}")
        if self.dual_cap is not None and not self.dual_cap > 1:
            raise ValueError(f"dual_cap must be greater than 1, got {self.dual_cap}")
        if self.sapo_tau_pos <= 0 or self.sapo_tau_neg <= 0:
            raise ValueError("sapo_tau_pos and sapo_tau_neg must be positive")
        if self.importance_cap is not None and self.importance_cap <= 0:
            raise ValueError(f"importance_cap must be positive, got {self.importance_cap}")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the log-probs of a reference policy."""
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
    """Trajectories through packed turns, which ratio level `sequence` needs beside the tokens."""

    offsets: Tensor  # (S+1,) int32 CSR of the S trajectories over the P entries
    turns: Tensor  # (P,) int32 turn of an entry, as an index into turn_offsets
    weight_pos: Tensor  # (P,) w * max(A, 0) of the trajectory for each token of the turn
    weight_neg: Tensor  # (P,) w * max(-A, 0) of the trajectory for each token of the turn


class HeadOptions(NamedTuple):
    """How an LM head makes logits of its products x: softcap * tanh(x / softcap) / temperature."""

    temperature: float = 1.0
    softcap: float | None = None  # None: x / temperature


class HeadInputs(NamedTuple):
    """Tensors by which an LM head is differentiated, or their gradients; None where there is none."""

    hidden: Tensor | None  # (A, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)


@dataclass(slots=True)
class TurnLoss:
    """Result of a policy loss.

    `coef` is the coefficient of every token's log-prob in the gradient: coef[t] = d loss / d logprob[t], detached, and
    without the way through the entropy. A token of coefficient 0 (clipped, of zero weight, or outside the mask) can be
    left out of the backward; such tokens are called *skipped*.
    """

    loss: Tensor  # () differentiable in logprob (and entropy); (A,) or (B, T) with reduction="none"
    metrics: dict[str, Tensor]  # detached device scalars; see turn_policy_loss
    coef: Tensor  # (A,) or (B, T) coefficient of the log-prob, detached


@dataclass(slots=True)
class LinearTurnLoss(TurnLoss):
    """Result of `linear_turn_policy_loss`: `loss` is differentiable in the LM head's inputs."""

    logprob: Tensor  # (A,) log-probs of the targets, detached
    entropy: Tensor  # (A,) entropies in nats, detached
