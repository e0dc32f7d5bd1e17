"""Credit assignment: from leaf rewards to advantages."""

from atpo_fast.credit.assign import METHODS, assign_credit

__all__ = ["METHODS", "assign_credit"]
