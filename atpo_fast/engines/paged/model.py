"""A Hugging Face causal LM that runs on packed tokens over the slot pool (docs/design.md#prefix-sharing)."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from atpo_fast.common.logits import logit_rule
from atpo_fast.engines.paged.attention import ATTENTION, PagedBatch
from atpo_fast.models.layers import find_problems
from atpo_fast.recurrent.carried import CarriedStates
from atpo_fast.recurrent.layers import carry_states


class PagedModel:
    """The backbone and the head of `model`, which from now on belongs to the engine.

    Raises:
        ValueError: a layer or a setting of the model that the engine would compute wrongly.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None):
        _own_config(model)
        _check_architecture(model)
        model.set_attn_implementation(ATTENTION)
        if dtype is not None:  # parameters only: the frequencies of the rotary embedding must stay float32
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
        self.has_states = carry_states(model)
        self._rule = logit_rule(model.config)
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self._wide_head: Tensor | None = None  # float32 copy of a low-precision head, for devices without mixed GEMM

    def forward(
        self,
        tokens: Tensor,  # (T,) int64
        positions: Tensor,  # (T,) int64 position of each token on its path
        paged: PagedBatch,
        states: CarriedStates | None = None,
    ) -> Tensor:
        """Return (T, D) final hidden states; write keys, values and states into the pools."""
        carried = {} if states is None else {"seq_idx": states}
        out = self.model.base_model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, paged=paged, **carried
        )
        return out.last_hidden_state[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return (R, V) logits of `hidden` (R, D): float32 even where the weights are bfloat16, float64 if they are."""
        return self._rule.apply(self._products(hidden))

    def _products(self, hidden: Tensor) -> Tensor:  # (R, D) -> (R, V)
        head = self.model.get_output_embeddings()
        if head.weight.dtype in (torch.float32, torch.float64):
            return head(hidden)
        if hidden.is_cuda:
            logits = torch.mm(hidden, head.weight.t(), out_dtype=torch.float32)
        else:
            if self._wide_head is None:
                self._wide_head = head.weight.float()
            logits = linear(hidden.float(), self._wide_head)
        return logits if head.bias is None else logits + head.bias

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy new weights in, one tensor at a time; they have been checked against `parameter_shapes`."""
        own = dict(self.model.named_parameters())
        self._wide_head = None
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)

    def move(self, device: torch.device) -> None:
        """Put the weights on a device, another one while the engine sleeps."""
        self._wide_head = None
        self.model.to(device)


def _own_config(model: PreTrainedModel) -> None:
    """Give the model its own copy of the configuration, which holds the attention to use; others may share it."""
    shared = model.config
    own = copy.deepcopy(shared)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def _check_architecture(model: PreTrainedModel) -> None:
    if problems := find_problems(model):
        raise ValueError(f"{type(model).__name__} does not run in the paged engine: {'; '.join(problems)}")
