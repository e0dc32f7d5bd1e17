"""The policy over packed rows."""

from atpo_fast.policy.head import PolicyHead, RowLoss
from atpo_fast.policy.model import build_model, load_model
from atpo_fast.policy.policy import Policy
from atpo_fast.policy.update import accumulate_gradients

__all__ = ["Policy", "PolicyHead", "RowLoss", "accumulate_gradients", "build_model", "load_model"]
