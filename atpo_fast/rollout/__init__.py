"""Rollout: the tree search lets an engine write turns, runs tools and grows search trees."""

from atpo_fast.rollout.counters import RolloutCounters
from atpo_fast.rollout.expansion import expansion_scores, keep_leaves, select_turns
from atpo_fast.rollout.tree_search import TreeSearch, begin_sessions, in_order

__all__ = [
    "RolloutCounters",
    "TreeSearch",
    "begin_sessions",
    "expansion_scores",
    "in_order",
    "keep_leaves",
    "select_turns",
]
