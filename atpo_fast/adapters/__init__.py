"""LoRA adapters on a Hugging Face model, through PEFT: add them, switch them off, and take whole weights out of them.

PEFT is imported only where a model has adapters (`pip install 'atpo-fast[lora]'`).
"""

from atpo_fast.adapters.lora import (
    ADAPTER,
    AdapterSettings,
    add_adapters,
    has_adapters,
    peft_config,
    plain_model,
    without_adapters,
)
from atpo_fast.adapters.weights import Weight, adapter_weights, load_adapters, save_adapters, whole_weights

__all__ = [
    "ADAPTER",
    "AdapterSettings",
    "Weight",
    "adapter_weights",
    "add_adapters",
    "has_adapters",
    "load_adapters",
    "peft_config",
    "plain_model",
    "save_adapters",
    "whole_weights",
    "without_adapters",
]
