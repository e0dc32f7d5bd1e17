"""The policy objective."""

from atpo_fast.objective.objective import Objective

__all__ = ["Objective"]
