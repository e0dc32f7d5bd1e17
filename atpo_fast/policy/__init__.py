"""The policy: a causal LM over packed rows, its log-probs, losses and gradients."""

from atpo_fast.policy.head import PolicyHead, RowLoss
from atpo_fast.policy.model import load_model
from atpo_fast.policy.opened_rows.run import accumulate_gradients, score_rows
from atpo_fast.policy.policy import Policy

__all__ = ["Policy", "PolicyHead", "RowLoss", "accumulate_gradients", "load_model", "score_rows"]
