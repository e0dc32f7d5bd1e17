"""What is optimised: the loss of one packed row, and the named presets (docs/design.md#objective)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from atpo_fast.common.presets import PRESETS
from atpo_fast.tree.packed_rows import PackedTrees
from atpo_kernels import LeafPaths, LossConfig, TokenWeights, TurnLoss, turn_policy_loss
from atpo_kernels.choices import Aggregation, Denominator, check_choice


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The policy objective: the per-token loss and how tokens are averaged."""

    loss_config: LossConfig = field(default_factory=LossConfig)
    """Ratio level, clip family, dual cap, KL, entropy bonus, importance weights."""
    aggregation: Aggregation = "seq-mean-token-mean"
    """Weight of a token of a trajectory: see docs/design.md#aggregation."""
    denominator: Denominator = "global"
    """global: means over the whole mini-batch on all ranks. local: over each packed row, then over the rows."""
    max_length: int = 1
    """L_max of seq-mean-token-sum-norm, in tokens."""
    entropy_advantage: float = 0.0
    """AEPO: advantages are multiplied by 1 + this * standardised entropy of the token; 0 switches it off."""

    def __post_init__(self) -> None:
        check_choice("aggregation", self.aggregation, Aggregation)
        check_choice("denominator", self.denominator, Denominator)
        if self.entropy_advantage and self.loss_config.level == "sequence":
            raise ValueError(
                f"entropy_advantage={self.entropy_advantage:g} gives every token an advantage of its own, for which "
                "level='sequence' has no place: set it to 0, or the level to token or turn"
            )

    @property
    def whole_trajectories(self) -> bool:
        """Whether rows have to hold trajectories whole: for ratios over trajectories, and means over rows."""
        return self.loss_config.level == "sequence" or self.denominator == "local"

    @property
    def every_token_counts(self) -> bool:
        """Whether tokens without advantage matter too.

        They do for KL and entropy terms, for `local` denominators, and for entropy-aware advantages, whose statistics
        run over all tokens.
        """
        config = self.loss_config
        terms = config.needs_reference or config.needs_entropy or self.entropy_advantage != 0
        return terms or self.denominator == "local"

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Objective:
        """Make the objective of a published method; `overrides` are fields of this class or of `LossConfig`.

        Raises ValueError for an unknown name, naming the known ones.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown objective {name!r}: must be one of {', '.join(PRESETS)}")
        return cls().with_(**{**PRESETS[name], **overrides})

    def with_(self, **overrides: Any) -> Objective:
        """Copy with some fields of this class or of its `LossConfig` replaced."""
        own = {k: v for k, v in overrides.items() if k in self.__dataclass_fields__}
        inner = {k: v for k, v in overrides.items() if k not in own}
        config = own.pop("loss_config", self.loss_config)
        return replace(self, loss_config=replace(config, **inner), **own)

    def loss(self, logprob: Tensor, row: PackedTrees, entropy: Tensor | None = None) -> Tensor:
        """Compute the () loss of a row from its (A,) log-probs; losses of all rows of a batch sum to the batch loss."""
        return self.evaluate(logprob, row, entropy).loss

    def evaluate(self, logprob: Tensor, row: PackedTrees, entropy: Tensor | None = None) -> TurnLoss:
        """Compute loss, metrics and coefficients of a row from its (A,) log-probs and, where needed, (A,) entropies."""
        return turn_policy_loss(
            logprob,
            row.old_logprob,
            turn_offsets=row.turn_offsets,
            weights=token_weights(row),
            paths=leaf_paths(row),
            ref_logprob=row.ref_logprob,
            rollout_logprob=row.rollout_logprob,
            entropy=entropy,
            reduction="sum",
            clip_low=row.clip_low,
            clip_high=row.clip_high,
            config=self.loss_config,
        )


def token_weights(row: PackedTrees) -> TokenWeights:
    """Collect the (A,) weights W+, W-, W0 of a row."""
    return TokenWeights(row.weight_pos, row.weight_neg, row.weight_all)


def leaf_paths(row: PackedTrees) -> LeafPaths:
    """Collect the path tables of a row."""
    return LeafPaths(row.path_offsets, row.path_turns, row.path_weight_pos, row.path_weight_neg)
