"""Fused operators for policy-gradient training of agents on turns and search trees (design, section 6).

Importing needs neither a GPU nor Triton: CUDA tensors take a Triton kernel where this build has one, everything else a
PyTorch path with bounded memory.
"""

from __future__ import annotations

from atpo_kernels.linear_logprob import linear_logprob
from atpo_kernels.linear_turn_policy_loss import linear_turn_policy_loss
from atpo_kernels.linear_turn_policy_loss.module import FusedLinearTurnPolicyLoss
from atpo_kernels.records import LeafPaths, LinearTurnLoss, LossConfig, TokenWeights, TurnLoss
from atpo_kernels.tree_attention import TreeBlocks, make_attention_blocks, make_tree_blocks, tree_attention
from atpo_kernels.turn_policy_loss import turn_policy_loss

__all__ = [
    "FusedLinearTurnPolicyLoss",
    "LeafPaths",
    "LinearTurnLoss",
    "LossConfig",
    "TokenWeights",
    "TreeBlocks",
    "TurnLoss",
    "linear_logprob",
    "linear_turn_policy_loss",
    "make_attention_blocks",
    "make_tree_blocks",
    "tree_attention",
    "turn_policy_loss",
]
