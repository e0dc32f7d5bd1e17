"""The policy over packed rows."""

from atpo_fast.policy.head import PolicyHead, RowLoss
from atpo_fast.policy.model import build_model, load_model
from atpo_fast.policy.policy import Policy

__all__ = ["Policy", "PolicyHead", "RowLoss", "build_model", "load_model"]
