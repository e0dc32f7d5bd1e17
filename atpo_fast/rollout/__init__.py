"""Rollout: the turn loop lets an engine write turns, runs tools and grows search trees."""

from atpo_fast.rollout.counters import RolloutCounters
from atpo_fast.rollout.expansion import expansion_scores, keep_leaves, select_turns
from atpo_fast.rollout.turn_loop import TurnLoop

__all__ = ["RolloutCounters", "TurnLoop", "expansion_scores", "keep_leaves", "select_turns"]
