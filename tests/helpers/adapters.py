"""Models with adapters that do something: PEFT's own, for the tests of LoRA."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.helpers.flat_reference import exact_norms
from tests.helpers.policies import make


def wake_adapters(model: nn.Module) -> None:
    """Give every B, which begins at 0, random numbers that do not depend on the order of the modules."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            seed = sum(map(ord, name))
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            parameter.data.copy_(0.2 * values)


def peft_model(name: str, **options: Any) -> PeftModel:
    """A tiny model in float64 with adapters of rank 3 on all its linear layers, from PEFT itself."""
    model = exact_norms(make(name))
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(**({"r": 3, "lora_alpha": 7, "target_modules": "all-linear"} | options)))
    wake_adapters(adapted)
    return adapted
