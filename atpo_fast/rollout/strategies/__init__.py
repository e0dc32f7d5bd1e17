"""Strategies: the ways in which the tree of a question grows, by `rollout.strategy`; one module for each source."""

from __future__ import annotations

from atpo_fast.common.choices import Strategy as StrategyName
from atpo_fast.rollout.strategies.aepo import BalancedBranching
from atpo_fast.rollout.strategies.arpo import EntropyBranching
from atpo_fast.rollout.strategies.base import Round, Strategy
from atpo_fast.rollout.strategies.expansion import Chains, EntropyExpansion, OneChain, RandomExpansion
from atpo_fast.rollout.strategies.tree_grpo import RandomChildren

__all__ = ["STRATEGIES", "OneChain", "Round", "Strategy"]

STRATEGIES: dict[StrategyName, type[Strategy]] = {
    "entropy": EntropyExpansion,
    "random": RandomExpansion,
    "chain": Chains,
    "arpo": EntropyBranching,
    "aepo": BalancedBranching,
    "tree_grpo": RandomChildren,
}
"""The class of each value of `rollout.strategy`."""
