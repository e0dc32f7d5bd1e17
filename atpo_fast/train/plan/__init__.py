"""What a training will take: memory of a rank by component, tokens of a row, time of a step; said before it starts."""

from atpo_fast.train.plan.memory import Component, MemoryPlan, plan_memory
from atpo_fast.train.plan.sizes import ModelSize, model_size
from atpo_fast.train.plan.words import cost_lines, parse_memory, plan_lines

__all__ = [
    "Component",
    "MemoryPlan",
    "ModelSize",
    "cost_lines",
    "model_size",
    "parse_memory",
    "plan_lines",
    "plan_memory",
]
