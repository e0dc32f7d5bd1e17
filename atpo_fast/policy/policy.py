"""The policy: a Hugging Face causal LM over packed rows, LM head on action rows only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atpo_fast.objective import Objective
from atpo_fast.packing.packed_trees import PackedTrees
from atpo_fast.policy.attention import TREE_ATTENTION, attention_blocks, check_supported, register
from atpo_fast.policy.checkpointing import GradientTokens, enable_checkpointing
from atpo_fast.policy.head import RowLoss, install_head


class Policy(nn.Module):
    """Runs packed rows through a causal LM.

    Args:
        model: any causal LM with full attention, a backbone at `.model` and a linear `.lm_head`. Its attention and
            head are replaced; parameter names stay Hugging Face's.
        temperature: sampling temperature of the rollouts, applied to the logits.
        gradient_checkpointing: recompute each layer in the backward, without the tokens that carry no gradient.

    Raises ValueError for models with windowed or capped attention.
    """

    def __init__(self, model: PreTrainedModel, *, temperature: float = 1.0, gradient_checkpointing: bool = False):
        super().__init__()
        check_supported(model.config)
        register()
        model.set_attn_implementation(TREE_ATTENTION)
        install_head(model, temperature)
        if gradient_checkpointing:
            enable_checkpointing(model)
        self.model = model
        self.dropped_tokens = 0  # left out of backward passes so far, with gradient checkpointing

    def forward(self, row: PackedTrees, objective: Objective | None = None) -> tuple[Tensor, Tensor] | RowLoss:
        """Score one row: ((A,) log-prob, (A,) entropy), or its loss when an objective is given."""
        hidden = self.hidden_states(row)
        return self.model.lm_head(hidden.index_select(0, row.predictor), row, objective)

    def hidden_states(self, row: PackedTrees) -> Tensor:
        """(T, D) final hidden states of a row."""
        subtree_end = row.subtree_end.to(self.device, non_blocking=True)
        tokens = GradientTokens(subtree_end, self._attention_blocks)
        out = self.model.model(
            input_ids=row.input_ids[None],
            position_ids=row.position_ids[None],
            use_cache=False,
            subtree_end=subtree_end,
            tree_blocks=self._attention_blocks(row.subtree_end),  # once for all layers
            gradient_tokens=tokens,
        )
        hidden = out.last_hidden_state
        if self.model.is_gradient_checkpointing and hidden.requires_grad:
            hidden.register_hook(lambda gradient: self._observe(tokens, gradient))
        return hidden[0]

    def _attention_blocks(self, subtree_end: Tensor) -> Any:  # (T,)
        return attention_blocks(self.model.config, subtree_end, self.model.dtype, self.device)

    def _observe(self, tokens: GradientTokens, gradient: Tensor) -> None:
        tokens.observe(gradient)
        self.dropped_tokens += tokens.dropped

    @property
    def device(self) -> torch.device:
        """Where rows have to be."""
        return next(self.parameters()).device
