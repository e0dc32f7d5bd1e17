"""Sections `reward`, `credit` and `objective`: from the outcome of a trajectory to the loss."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from atpo_fast.common.choices import (
    AncestorWeight,
    CreditMethod,
    Normalisation,
    Preset,
    SharedTurns,
    TurnAdvantage,
    TurnValue,
)
from atpo_fast.common.presets import PRESETS
from atpo_fast.config.section import STRICT, as_dict
from atpo_kernels.choices import Aggregation, ClipFamily, Denominator, KLEstimator, RatioLevel


@dataclass(config=STRICT, kw_only=True)
class OverlongConfig:
    """Penalty on long trajectories (DAPO's overlong shaping), in training only."""

    share: float = Field(default=0.0, ge=0, lt=1)
    """Last share of rollout.max_response_tokens over which the penalty grows from 0 to `factor`; tool results count as
    response. 0: no penalty. Published: 0.2."""
    factor: float = Field(default=1.0, gt=0)
    """Penalty of a trajectory of rollout.max_response_tokens tokens."""


@dataclass(config=STRICT, kw_only=True)
class RewardConfig:
    """Options of the rewards that have a name, and of what is taken off any reward; `task.rewards` says which count."""

    metric: Literal["em", "f1"] = "em"
    """Reward of a well-formed answer (of the reward published)."""
    format_penalty: float = -1.0
    """Reward of a trajectory that breaks the format (published, arpo_f1)."""
    tool_bonus: float = Field(default=0.1, ge=0)
    """Bonus added to F1 when both tools were used (the published rule); only with search and python together."""
    turn_cost: float = Field(default=0.0, ge=0)
    """Cost subtracted per tool call (published, arpo_f1)."""
    turn_penalty: float = Field(default=0.0, ge=0)
    """Penalty on each turn that breaks the format of a turn, as a reward of that turn (published for gtpo: 0.1)."""
    normalise: Normalisation = "published"
    """Normalisation of answers before they are compared. published: lower case, no ASCII punctuation, no articles.
    unicode: besides, one form of accents, dashes, quotes and widths, and no TeX commands around text."""
    overlong: OverlongConfig = Field(default_factory=OverlongConfig)
    """Penalty on long trajectories."""


@dataclass(config=STRICT, kw_only=True)
class CreditConfig:
    """Credit assignment: from leaf rewards to advantages."""

    method: CreditMethod = "at2po"
    """Method of credit. at2po, gtpo, igpo, a2tgpo: per turn. The others: per trajectory. igpo and a2tgpo forward every
    batch once more, for the probability of the gold answer after each turn."""
    leaf_norm: bool = True
    """Whether leaf rewards are standardised within the tree first (at2po)."""
    value: TurnValue = "child_softmax"
    """Value of an inner turn (at2po)."""
    advantage: TurnAdvantage = "node_value"
    """Advantage of a turn (at2po)."""
    pass_at_k: int = Field(default=4, ge=1)
    """Number k of the tries of which one has to succeed (passk)."""
    discount: float | None = Field(default=None, gt=0, le=1)
    """Factor of a reward that is one turn further away; none: 0.9 for gtpo, else 1. gtpo, igpo and a2tgpo discount from
    each turn on, the others from the first: the outcome of a trajectory and the rewards that the environment gave its
    turns."""
    ancestors: AncestorWeight = "leaves"
    """Weight of a leaf's comparison with those below an ancestor (treepo). leaves: their number. equal: always 1."""
    clip_spread: float = Field(default=0.5, ge=0, lt=1)
    """Share by which the clip range of a turn is widened or narrowed at most (a2tgpo)."""
    shared_turns: SharedTurns = "each"
    """Weight of a turn that lies on several trajectories. each: it counts in each of them. once: it counts once, shared
    among them."""

    @property
    def needs_gold(self) -> bool:
        """Whether the method reads how probable the gold answer is after each turn."""
        return self.method in ("igpo", "a2tgpo")

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `assign_credit`."""
        arguments = as_dict(self)
        return arguments | {"k": arguments.pop("pass_at_k")}


@dataclass(config=STRICT, kw_only=True)
class ObjectiveConfig:
    """The policy objective: a preset and departures from it."""

    preset: Preset = "at2po"
    """Published objective to start from."""
    level: RatioLevel | None = None
    """Level of the ratio; none: the preset's (likewise below)."""
    clip: ClipFamily | None = None
    """Clip family."""
    clip_low: float | None = Field(default=None, ge=0)
    """Lower clip range."""
    clip_high: float | None = Field(default=None, ge=0)
    """Upper clip range."""
    dual_cap: float | None = Field(default=None, ge=0)
    """Cap of the dual clip, beside any clip: where the advantage is negative and the ratio is greater than the cap, the
    loss is constant. Greater than 1; 0: no cap."""
    sapo_tau_pos: float | None = Field(default=None, gt=0)
    """Temperature of the sapo gate for positive advantages."""
    sapo_tau_neg: float | None = Field(default=None, gt=0)
    """Temperature of the sapo gate for negative advantages."""
    entropy_advantage: float | None = Field(default=None, ge=0)
    """Strength of AEPO's entropy-aware advantage; 0: off."""
    aggregation: Aggregation | None = None
    """Weights of the average over tokens."""
    denominator: Denominator | None = None
    """Range of the averages. global: the mini-batch on all ranks. local: each packed row, then the rows."""
    kl: KLEstimator | None = None
    """KL estimator."""
    kl_coef: float | None = Field(default=None, ge=0)
    """Weight of the KL term."""
    entropy_coef: float | None = Field(default=None, ge=0)
    """Weight of the entropy bonus."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Cap of the truncated importance weights."""

    def __post_init__(self) -> None:
        if self.dual_cap is not None and 0 < self.dual_cap <= 1:
            raise ValueError(f"objective.dual_cap={self.dual_cap:g}: must be greater than 1, or 0 for no cap")
        strength = self.resolved.get("entropy_advantage")
        if self.resolved["level"] == "sequence" and strength:
            raise ValueError(
                f"objective.entropy_advantage={strength:g} goes with objective.level=token or turn, not with sequence: "
                "set it to 0, or another level"
            )
        taus = [name for name in ("sapo_tau_pos", "sapo_tau_neg") if getattr(self, name) is not None]
        if taus and self.resolved["clip"] != "sapo":
            raise ValueError(f"objective.{taus[0]} is read by objective.clip=sapo only: leave it out, or set that clip")

    @property
    def resolved(self) -> dict[str, Any]:
        """Values of the preset and what is given beside it, by field; what neither sets is not among them."""
        return {**PRESETS[self.preset], **self.departures}

    @property
    def departures(self) -> dict[str, Any]:
        """Values that differ from the preset, by field of the objective or its loss."""
        given = {name: value for name, value in as_dict(self).items() if name != "preset" and value is not None}
        return given | ({"dual_cap": None} if given.get("dual_cap") == 0 else {})
