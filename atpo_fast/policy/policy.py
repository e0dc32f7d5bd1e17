"""The policy: a Hugging Face causal LM over packed rows, LM head on action rows only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atpo_fast.adapters.lora import plain_model, refuse_dropout
from atpo_fast.common.choices import GradientCheckpointing, Liger
from atpo_fast.models.layers import describe_layers
from atpo_fast.objective import Objective
from atpo_fast.policy.attention import TREE_ATTENTION, RowBlocks, check_supported, register
from atpo_fast.policy.checkpointing import GradientTokens, enable_checkpointing
from atpo_fast.policy.head import RowLoss, install_head
from atpo_fast.policy.layers import use_liger
from atpo_fast.policy.opened_rows.prefix import NO_PREFIX, RowPrefix
from atpo_fast.policy.opened_rows.states import RowStates
from atpo_fast.policy.plain import as_transformers
from atpo_fast.policy.router_loss import RouterLoss
from atpo_fast.recurrent.layers import carry_states
from atpo_fast.recurrent.segments import Segments
from atpo_fast.tree.packed_rows import PackedTrees

if TYPE_CHECKING:
    from peft import PeftModel


class Policy(nn.Module):
    """A causal LM over packed rows.

    Args:
        model: a causal LM of attention layers, full or over windows, and layers with a state, with a backbone at
            `.model` and a linear `.lm_head` (docs/supported_models.md), or PEFT's `PeftModel` around one, whose
            adapters are in the backbone. Its attention and head are replaced; parameter names stay those of the causal
            LM.
        temperature: sampling temperature of the rollouts, applied to the logits.
        gradient_checkpointing: what the backward computes again, without the tokens that carry no gradient: `none`,
            each decoder `layer`, or only its `mlp`.
        liger: `auto` runs RMSNorm, SwiGLU and RoPE of the architectures in `layers.MODEL_TYPES` on Liger's kernels
            where the tensors are on CUDA and liger-kernel is installed; `off` leaves the layers unchanged.
        router_balance: weight of the balance of the experts in the loss, for mixtures of experts.
        router_z: weight of the z-loss of their routers.

    Raises:
        ValueError: models with layers that trees do not run through, with active dropout, or with virtual tokens of
            PEFT, and those that the choice of gradient_checkpointing or a weight of the routers' losses does not suit.
        TypeError: a head that is not a plain linear layer, such as one with an adapter.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        temperature: float = 1.0,
        gradient_checkpointing: GradientCheckpointing = "none",
        liger: Liger = "auto",
        router_balance: float = 0.0,
        router_z: float = 0.0,
    ):
        super().__init__()
        model = plain_model(model)
        refuse_dropout(model)
        check_supported(model)
        register()
        self._plain_attention, self._temperature = model.config._attn_implementation, temperature
        model.set_attn_implementation(TREE_ATTENTION)
        self._has_states = carry_states(model)
        install_head(model, temperature)
        if liger == "auto" and torch.cuda.is_available():
            use_liger(model)
        enable_checkpointing(model, gradient_checkpointing)
        self.model = model
        self.router_loss = RouterLoss(model, router_balance, router_z) if router_balance or router_z else None
        self._windows = [layer.window for layer in describe_layers(model.config)]
        self.skipped_tokens = 0  # left out of backward passes so far, with gradient checkpointing

    def forward(
        self,
        row: PackedTrees,
        objective: Objective | None = None,
        prefix: RowPrefix = NO_PREFIX,
        score: bool = True,
        plain: bool = False,
    ) -> tuple[Tensor, Tensor] | RowLoss | Tensor:
        """Score one row: ((A,) log-prob, (A,) entropy), or its loss when an objective is given.

        Args:
            row: a row on the policy's device.
            objective: what the loss is of; none: log-probs and entropies.
            prefix: what the row reads of the rows above it and leaves for those below (`run_passes`).
            score: False leaves the head out and returns the (A, D) hidden states that predict the action tokens.
            plain: True returns the (A,) log-probs of a row of one trajectory as transformers computes them, by its own
                attention, layers and logits.
        """
        if plain:
            return self._plain_logprobs(row)
        hidden = prefix.predicting(self.hidden_states(row, prefix), row.predictor)
        if not score:
            return hidden
        out = self.model.lm_head(hidden, row, objective)
        if self.router_loss is not None and isinstance(out, RowLoss):
            self.router_loss.attach(row, out.loss)
        return out

    def hidden_states(self, row: PackedTrees, prefix: RowPrefix = NO_PREFIX) -> Tensor:
        """Compute the (T, D) final hidden states of a row. Raises ValueError for a row whose prefix is not given."""
        if len(prefix.above) != row.depth:
            raise ValueError(
                f"this row continues {row.depth} opened rows, but {len(prefix.above)} are given: use `score_rows` or "
                "`accumulate_gradients`, which pass rows as `plan_passes` says, or pack with max_prefix=0"
            )
        subtree_end = row.subtree_end.to(self.device, non_blocking=True)

        def structure(subtree_end: Tensor) -> dict[str, Any]:  # (T,)
            return self._structure(subtree_end, row.prefix_tokens, prefix)

        tokens = GradientTokens(subtree_end, structure)
        out = self.model.model(
            input_ids=row.input_ids[None],
            position_ids=row.position_ids[None],
            use_cache=False,
            subtree_end=subtree_end,
            gradient_tokens=tokens,
            row_prefix=prefix,
            **structure(row.subtree_end),
        )
        hidden = out.last_hidden_state
        leaves_out = self.model.is_gradient_checkpointing and self.model.training and self.router_loss is None
        if leaves_out and hidden.requires_grad and not prefix.closing:
            hidden.register_hook(lambda gradient: self._observe(tokens, gradient))
        return hidden[0]

    def _plain_logprobs(self, row: PackedTrees) -> Tensor:  # (A,)
        with as_transformers(self.model, self._plain_attention):
            logits = self.model(input_ids=row.input_ids[None], use_cache=False).logits[0]
        wide = torch.promote_types(logits.dtype, torch.float32)
        table = (logits[row.predictor].to(wide) / self._temperature).log_softmax(-1)
        return table.gather(1, row.targets[:, None])[:, 0]

    def _structure(self, subtree_end: Tensor, prefix_tokens: int, prefix: RowPrefix) -> dict[str, Any]:  # (T,)
        """Make the keyword arguments that tell all layers how the tokens of a row hang together."""
        blocks = RowBlocks(self._windows, prefix_tokens, subtree_end)
        if not self._has_states:
            return {"tree_blocks": blocks}
        return {"tree_blocks": blocks, "seq_idx": RowStates(Segments.of_trees(subtree_end, self.device), prefix)}

    def _observe(self, tokens: GradientTokens, gradient: Tensor) -> None:  # (1, T, D)
        tokens.observe(gradient)
        self.skipped_tokens += tokens.skipped

    @property
    def device(self) -> torch.device:
        """The device on which rows have to be."""
        return next(self.parameters()).device
