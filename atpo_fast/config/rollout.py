"""Section `rollout`: the shape of the tree search, its sampling and its limits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from atpo_fast.config.section import STRICT


@dataclass(config=STRICT, kw_only=True)
class RolloutConfig:
    """Shape of the tree search, its sampling and its limits."""

    strategy: Literal["entropy", "random", "chain"] = "entropy"
    """How the tree is expanded."""
    initial_chains: int = Field(default=10, ge=1)
    """Number of chains from the root (M)."""
    expansion_rounds: int = Field(default=2, ge=0)
    """Number of rounds of expansion (L)."""
    expansions_per_round: int = Field(default=6, ge=0)
    """Number of turns re-sampled in a round (K)."""
    samples_per_tree: int | None = Field(default=None, ge=1)
    """Number of leaves kept per question; none: M + L*K (chain: M)."""
    branch_penalty: float = Field(default=0.05, ge=0)
    """Penalty alpha of the expansion score, for each sibling."""
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

    @property
    def leaves(self) -> int:
        """Number of trajectories per question."""
        if self.samples_per_tree is not None:
            return self.samples_per_tree
        extra = 0 if self.strategy == "chain" else self.expansion_rounds * self.expansions_per_round
        return self.initial_chains + extra
