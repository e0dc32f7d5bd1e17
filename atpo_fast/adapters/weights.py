"""Weights out of a model with adapters: whole ones, as if they had been merged, or those of the adapters alone.

A `Weight` says what it is made of, so that ZeRO-3's parameters can be gathered before it is made.
See docs/lora.md#weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import Parameter

from atpo_fast.adapters.lora import ADAPTER, check_mergeable, lora_layers

_PEFT_PREFIX = "base_model.model."  # what PEFT writes before the model's own names
_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight by its name, and how it is made of parameters."""

    name: str
    parameters: tuple[Parameter, ...]  # the weight itself, or W (out, in), A (rank, in) and B (out, rank)
    scaling: float = 0.0  # of B A

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters, whole, though they may be partitioned."""
        return sum(int(getattr(p, "ds_numel", p.numel())) * p.element_size() for p in self.parameters)

    def make(self) -> Tensor:
        """Return the weight, detached: a parameter itself, or W + scaling B A, added in float32 and rounded once."""
        if len(self.parameters) == 1:
            return self.parameters[0].detach()
        base, a, b = (parameter.detach() for parameter in self.parameters)
        wide = torch.promote_types(base.dtype, torch.float32)
        return torch.addmm(base.to(wide), b.to(wide), a.to(wide), alpha=self.scaling).to(base.dtype)


def whole_weights(model: nn.Module) -> Iterator[Weight]:
    """Yield every weight of a model under its Hugging Face name, adapters merged into theirs; tied ones once.

    Raises ValueError for adapters that are not LoRA on a linear layer.
    """
    layers = lora_layers(model)
    check_mergeable(layers)
    inner = tuple(f"{name}." for name in layers)
    for name, parameter in model.named_parameters():
        if not name.startswith(inner):
            yield Weight(name, (parameter,))
            continue
        layer, _, rest = name.partition(".base_layer.")
        if not rest:  # one of the adapter's, which the weight of its layer takes in
            continue
        module = layers[layer]
        if rest == "weight":
            a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
            yield Weight(f"{layer}.weight", (parameter, a, b), module.scaling[ADAPTER])
        else:
            yield Weight(f"{layer}.{rest}", (parameter,))


def adapter_weights(model: nn.Module) -> Iterator[Weight]:
    """Yield the weights of the adapters alone, under their names in the model."""
    for name, module in lora_layers(model).items():
        for part in ("lora_A", "lora_B"):
            yield Weight(f"{name}.{part}.{ADAPTER}.weight", (getattr(module, part)[ADAPTER].weight,))


def save_adapters(config: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write a folder that `PeftModel.from_pretrained` reads.

    Args:
        config: PEFT's configuration of the adapters, which names the model that they belong on.
        weights: tensors by the names of `adapter_weights`.
        folder: created where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_name_in_file(name): tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / _FILE, metadata={"format": "pt"})
    config = copy(config)
    config.inference_mode = True
    config.save_pretrained(str(folder))


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Give a model's adapters the weights that `save_adapters` has written; before they are partitioned.

    Raises ValueError when the folder holds adapters of other layers or of another rank.
    """
    stored = load_file(folder / _FILE)
    own = {_name_in_file(weight.name): weight.parameters[0] for weight in adapter_weights(model)}
    wrong = [name for name in own.keys() | stored.keys() if name not in own or name not in stored]
    wrong += [name for name in own.keys() & stored.keys() if own[name].shape != stored[name].shape]
    if wrong:
        raise ValueError(f"{folder}: adapters of other layers or another rank (model.lora): {sorted(wrong)[0]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(stored[name])


def _name_in_file(name: str) -> str:
    return _PEFT_PREFIX + name.replace(f".{ADAPTER}.weight", ".weight")
