"""Rollout: an engine writes turns, the turn loop runs tools and grows search trees."""

from atpo_fast.rollout.engine import Completion, Engine, EngineCounters, PathNode, Request, SamplingParams
from atpo_fast.rollout.expansion import expansion_scores, keep_leaves, select_turns
from atpo_fast.rollout.reporting import RolloutCounters
from atpo_fast.rollout.transformers_engine import TransformersEngine
from atpo_fast.rollout.turn_loop import TurnLoop

__all__ = [
    "Completion",
    "Engine",
    "EngineCounters",
    "PathNode",
    "Request",
    "RolloutCounters",
    "SamplingParams",
    "TransformersEngine",
    "TurnLoop",
    "expansion_scores",
    "keep_leaves",
    "select_turns",
]
