"""A Hugging Face causal LM that runs on packed tokens over the slot pool (design, section 7)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from difflib import get_close_matches

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from atpo_fast.engines.paged.attention import ATTENTION, PagedBatch


class PagedModel:
    """The backbone and the head of `model`, which from now on belongs to the engine.

    Raises:
        ValueError: the architecture does not take attention functions, or limits attention to a window.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None):
        _own_config(model)
        _check_architecture(model)
        model.set_attn_implementation(ATTENTION)
        if dtype is not None:  # parameters only: the frequencies of the rotary embedding must stay float32
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self._wide_head: Tensor | None = None  # float32 copy of a low-precision head, for devices without mixed GEMM

    def forward(
        self,
        tokens: Tensor,  # (T,) int64
        positions: Tensor,  # (T,) int64 position of each token on its path
        paged: PagedBatch,
    ) -> Tensor:
        """(T, D) final hidden states; writes the tokens' keys and values into the pool."""
        out = self.model.base_model(input_ids=tokens[None], position_ids=positions[None], use_cache=False, paged=paged)
        return out.last_hidden_state[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, V) logits of `hidden` (R, D): float32 even where the weights are bfloat16, float64 if they are."""
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

    def load(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Copy new weights in, one tensor at a time; a tied parameter may come under any or all of its names.

        Raises:
            KeyError: a name that the model does not have.
            ValueError: a tensor of another shape, or parameters that never came.
        """
        own = dict(self.model.named_parameters(remove_duplicate=False))
        missing = {id(parameter): name for name, parameter in own.items()}
        self._wide_head = None
        for name, tensor in named_parameters:
            if name not in own:
                near = get_close_matches(name, own, n=1)
                hint = f"; nearest: {near[0]!r}" if near else ""
                raise KeyError(f"the engine's model has no parameter {name!r}{hint}")
            if own[name].shape != tensor.shape:
                raise ValueError(f"{name}: new weights have shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}")
            with torch.no_grad():
                own[name].copy_(tensor)
            missing.pop(id(own[name]), None)
        if missing:
            raise ValueError(f"new weights lack {len(missing)} parameters: {', '.join(sorted(missing.values())[:5])}")

    def move(self, device: torch.device) -> None:
        """Put the weights on another device (see `Engine.sleep`)."""
        self._wide_head = None
        self.model.to(device)


def _own_config(model: PreTrainedModel) -> None:
    """Unshare the configuration, which holds the attention to use, from other models built with the same object."""
    shared = model.config
    own = copy.deepcopy(shared)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def _check_architecture(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{name} does not let its attention be replaced; use a Qwen, Llama or similar model")
    windows = {kind for kind in getattr(model.config, "layer_types", None) or [] if kind != "full_attention"}
    if windows:
        raise ValueError(f"{name} has layers of kind {sorted(windows)}; the transformers engine needs full attention")
