"""The policy's model as transformers runs it, to compare packed rows with: own attention, own layers, own logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def as_transformers(model: PreTrainedModel, attention: str) -> Iterator[None]:
    """Undo what the policy has bound to a model's layers, and let it attend by `attention` ("sdpa", "eager")."""
    packed = model.config._attn_implementation
    bound = {module: vars(module).pop("forward") for module in model.modules() if "forward" in vars(module)}
    model.set_attn_implementation(attention)
    try:
        yield
    finally:
        model.set_attn_implementation(packed)
        for module, forward in bound.items():
            vars(module)["forward"] = forward


@contextmanager
def perturbed(model: PreTrainedModel, size: float, seed: int = 0) -> Iterator[None]:
    """Multiply what the embedding and every decoder layer return by 1 + u, u uniform in [-size, size].

    With the rounding error of the model's dtype as size, this shows how far rounding moves the model's results.
    """
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, inputs: object, out: Tensor) -> Tensor:
        noise = torch.rand(out.shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1).mul_(size)
        return (out * (1 + noise.to(out.device))).to(out.dtype)

    with ExitStack() as stack:
        for module in (model.get_input_embeddings(), *model.base_model.layers):
            stack.callback(module.register_forward_hook(disturb).remove)
        yield
