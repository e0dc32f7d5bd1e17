"""The policy over packed rows."""

from atpo_fast.policy.head import PolicyHead, RowLoss
from atpo_fast.policy.model import build_model, load_model
from atpo_fast.policy.opened_rows.run import accumulate_gradients
from atpo_fast.policy.policy import Policy

__all__ = ["Policy", "PolicyHead", "RowLoss", "accumulate_gradients", "build_model", "load_model"]
