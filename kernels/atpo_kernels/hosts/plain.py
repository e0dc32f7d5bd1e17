"""Any PyTorch model: an LM head that computes the fused loss in its forward, where its weight is whole."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

from atpo_kernels.fused_module import FusedLinearTurnPolicyLoss
from atpo_kernels.linear_logprob import linear_logprob


class LossHead(nn.Module):
    """A linear LM head whose forward gives logits, log-probs or the loss; parameters keep their names and ties.

    Under ZeRO-3 and FSDP a weight is whole only in the forward of the module that owns it, so the head calls the loss.
    Put it in place before the model is wrapped. Raises TypeError for a head that is not linear.
    """

    def __init__(self, linear: nn.Linear, loss: FusedLinearTurnPolicyLoss):
        super().__init__()
        if not isinstance(linear, nn.Linear):
            name = f"{type(linear).__module__}.{type(linear).__qualname__}"
            raise TypeError(f"LossHead: the LM head is a {name}; expected torch.nn.Linear")
        self.weight, self.bias, self.loss = linear.weight, linear.bias, loss

    def forward(self, hidden: Tensor, *batch: Any, **more: Any) -> Any:  # (..., D)
        """Return logits (..., V) of `hidden` alone; else, with hidden (B, T, D), one of these.

        * selected_token_ids (B, T) alone: their log-probs and entropies, (B, T) each, as the loss computes them.
        * arguments of `FusedLinearTurnPolicyLoss.forward`, by position or by name: what it returns, (loss, metrics).
        """
        if not batch and not more:
            return nn.functional.linear(hidden, self.weight, self.bias)
        if batch or more.keys() != {"selected_token_ids"}:
            return self.loss(hidden, self.weight, *batch, bias=self.bias, **more)
        ids = more["selected_token_ids"]
        with torch.autocast(hidden.device.type, enabled=False):
            flat = hidden.flatten(0, 1).to(self.weight.dtype)
            found = linear_logprob(
                flat, self.weight, ids.flatten(), bias=self.bias, temperature=self.loss.temperature, impl=self.loss.impl
            )
        return tuple(x.view(ids.shape) for x in found)


def add_turn_loss(model: Any, loss: FusedLinearTurnPolicyLoss) -> None:
    """Let a Hugging Face causal LM compute the loss: `model(input_ids=..., attention_mask=..., turn_loss=batch)`.

    `batch` holds arguments of `LossHead.forward` by name, of which `selected_token_ids` (B, T) are the last T of
    `input_ids` (B, P + T), and its `attention_mask` (B, T) is the loss mask. The forward is the whole model's, so the
    hooks of DDP, DeepSpeed and PEFT run. Give the inner model of a PEFT model (`get_base_model()`). Without `turn_loss`
    nothing changes.
    """
    model.lm_head = LossHead(model.lm_head, loss)
    original = model.forward

    @functools.wraps(type(model).forward)  # generate() checks the names of its arguments against it
    def forward(self: Any, *args: Any, turn_loss: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if turn_loss is None:
            return original(*args, **kwargs)
        length = turn_loss["selected_token_ids"].size(1)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state[:, -length - 1 : -1]
        return self.get_output_embeddings()(hidden, **turn_loss)

    model.forward = types.MethodType(forward, model)
