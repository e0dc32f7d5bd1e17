"""Section `rollout`: the shape of the tree search, its sampling and its limits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from atpo_fast.common.choices import Strategy
from atpo_fast.config.section import STRICT


@dataclass(config=STRICT, kw_only=True)
class RolloutConfig:
    """Shape of the tree search, its sampling and its limits."""

    strategy: Strategy = "entropy"
    """How a question's tree grows. entropy, random: rounds of expansion re-sample turns of high entropy or any turns.
    chain: no expansion. arpo, aepo: chains branch after a tool's result, by the entropy of what was written before it.
    tree_grpo: several trees a question, whose new branches continue from turns drawn at random."""
    initial_chains: int = Field(default=10, ge=1)
    """Number of chains from the root (M); arpo, aepo: those that begin, before any branch."""
    expansion_rounds: int = Field(default=2, ge=0)
    """Number of rounds of expansion (L); entropy, random and tree_grpo only."""
    expansions_per_round: int = Field(default=6, ge=0)
    """Number of new branches in a round of expansion (K); entropy, random and tree_grpo only."""
    samples_per_tree: int | None = Field(default=None, ge=1)
    """Number of leaves kept per tree; none: M + L*K (chain: M). arpo, aepo: number of chains in all, to be given."""
    trees_per_question: int = Field(default=1, ge=1)
    """Number of separate trees per question; tree_grpo only, which needs two or more."""
    branch_penalty: float = Field(default=0.05, ge=0)
    """Penalty alpha of the expansion score, for each sibling; entropy only."""
    branch_attempts: int = Field(default=1, ge=1)
    """Number of times that a chain may branch after each tool's result (beam size - 1); arpo, aepo only."""
    branch_threshold: float = Field(default=0.5, ge=0, le=1)
    """Threshold at which a draw becomes a branch; arpo, aepo only."""
    entropy_weight: float = Field(default=0.2, ge=0)
    """Weight by which a rise in entropy makes a branch more likely; arpo, aepo only."""
    streak_discount: float = Field(default=0.05, ge=0)
    """Discount on branching for each round in a row in which the question got a new chain; aepo only."""
    pre_monitoring: bool = True
    """Whether a probe and a chain, both thrown away, decide how many chains begin, in place of M; aepo only. It is on
    in the published code's defaults and off in the published script."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; also used by the loss."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Probability mass of nucleus sampling; 1 is off."""
    top_k: int = Field(default=0, ge=0)
    """Number of tokens of top-k sampling; 0 is off."""
    max_turn_tokens: int | None = Field(default=None, ge=1)
    """Longest action of one turn; none: only the response limit."""
    max_response_tokens: int = Field(default=6192, ge=1)
    """Longest trajectory after the prompt, tool results included."""
    schedule: Literal["streaming", "synchronous"] = "streaming"
    """Order of the work. streaming: a branch continues as soon as its tool answers, a tree is expanded as soon as
    its own chains are done, and the next question begins as soon as there is room. synchronous: all branches write a
    turn, then all tools run, and the trees of a group grow together. Both give the same trees but for rounding: what is
    decoded beside a request can change its last bits, and streaming depends on the tools' times. synchronous repeats a
    run exactly."""
    straggler_seconds: float = Field(default=0.0, ge=0)
    """Time limit for late tools. It starts once half of the branches of a tree's round are done and the others wait
    for tools only; when it ends, their turns stay leaves. 0: no limit but that of the tools."""

    def __post_init__(self) -> None:
        check_strategy(self)

    @property
    def monitored(self) -> bool:
        """Whether a monitoring round decides how many chains begin."""
        return self.strategy == "aepo" and self.pre_monitoring

    @property
    def grown_leaves(self) -> int:
        """Number of leaves of a full tree, before any is dropped."""
        if self.strategy in ("arpo", "aepo"):
            return self.leaves_per_tree
        extra = 0 if self.strategy == "chain" else self.expansion_rounds * self.expansions_per_round
        return self.initial_chains + extra

    @property
    def leaves_per_tree(self) -> int:
        """Number of trajectories that count in one tree."""
        return self.grown_leaves if self.samples_per_tree is None else self.samples_per_tree

    @property
    def leaves(self) -> int:
        """Number of trajectories per question."""
        return self.trees_per_question * self.leaves_per_tree


_USED_BY: dict[str, tuple[Strategy, ...]] = {
    "trees_per_question": ("tree_grpo",),
    "branch_attempts": ("arpo", "aepo"),
    "branch_threshold": ("arpo", "aepo"),
    "entropy_weight": ("arpo", "aepo"),
    "streak_discount": ("aepo",),
    "pre_monitoring": ("aepo",),
}
"""Keys that only some strategies read: a value other than the default is refused with the others."""


def check_strategy(rollout: RolloutConfig) -> None:
    """Check that the strategy reads the keys that are set, and that its keys fit one another. Raise ValueError."""
    _check_unused(rollout)
    if rollout.strategy in ("arpo", "aepo"):
        _check_branching(rollout)
    elif rollout.strategy == "tree_grpo":
        _check_tree_grpo(rollout)


def _check_unused(rollout: RolloutConfig) -> None:
    for key, strategies in _USED_BY.items():
        value, default = getattr(rollout, key), RolloutConfig.__dataclass_fields__[key].default
        default = default.default if isinstance(default, FieldInfo) else default
        if value != default and rollout.strategy not in strategies:
            raise ValueError(
                f"rollout.{key}={value} is read by rollout.strategy={' and '.join(strategies)} only, not by "
                f"{rollout.strategy}: leave it at {default}, or choose another strategy"
            )


def _check_branching(rollout: RolloutConfig) -> None:
    name, chains = rollout.strategy, rollout.samples_per_tree
    if chains is None:
        raise ValueError(
            f"rollout.strategy={name} needs rollout.samples_per_tree, the number of chains of a question (16 as "
            "published): branches and fresh chains are added until there are as many"
        )
    if rollout.initial_chains > chains and not rollout.monitored:
        raise ValueError(
            f"rollout.initial_chains={rollout.initial_chains} is more than rollout.samples_per_tree={chains}, all "
            f"chains that rollout.strategy={name} may have; lower the first (8 of 16 as published)"
        )
    if rollout.top_p < 1 or rollout.top_k:
        raise ValueError(
            f"rollout.strategy={name} needs rollout.top_p=1 and rollout.top_k=0: the entropy that decides about "
            "branches is that of the policy, not of a truncated distribution"
        )


def _check_tree_grpo(rollout: RolloutConfig) -> None:
    if rollout.trees_per_question < 2:
        raise ValueError(
            "rollout.strategy=tree_grpo needs rollout.trees_per_question of 2 or more: its credit compares a leaf with "
            "the others of its tree and with those of the question's other trees, and with one tree the two are the "
            "same; for a single tree use rollout.strategy=random"
        )
    if rollout.leaves_per_tree < 2:
        raise ValueError(
            f"rollout.strategy=tree_grpo needs 2 or more leaves in a tree, not {rollout.leaves_per_tree}: a lone leaf "
            "has nothing in its tree to be compared with, and its raw reward would stand in the credit; raise "
            "rollout.samples_per_tree or rollout.expansions_per_round"
        )
    if rollout.leaves_per_tree > rollout.grown_leaves:
        raise ValueError(
            f"rollout.samples_per_tree={rollout.leaves_per_tree} leaves are to be kept of a tree that has "
            f"{rollout.grown_leaves} (rollout.initial_chains + expansion_rounds * expansions_per_round)"
        )
