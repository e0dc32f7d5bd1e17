"""Inference engines: token ids in, token ids and log-probs out."""

from atpo_fast.engines.base import Completion, Engine, EngineCounters, PathNode, Request, SamplingParams

__all__ = ["Completion", "Engine", "EngineCounters", "PathNode", "Request", "SamplingParams"]
