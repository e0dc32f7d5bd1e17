"""The policy objective: the loss of a packed row, and the presets of published methods."""

from atpo_fast.objective.objective import Objective

__all__ = ["Objective"]
