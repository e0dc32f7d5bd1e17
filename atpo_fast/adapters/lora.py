"""Put LoRA adapters on a model, switch them off, and find the model inside PEFT's wrapper (docs/lora.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from atpo_fast.common.errors import InputError

ADAPTER = "default"
"""PEFT's name of the adapter of each layer that `add_adapters` makes."""


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What adapters to put where. A layer's weight W (out, in) becomes W + alpha / rank * B A."""

    rank: int  # rows of A (rank, in), and columns of B (out, rank), which begins at 0
    alpha: float
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"  # as PEFT's target_modules


def add_adapters(model: PreTrainedModel, settings: AdapterSettings, seed: int) -> PreTrainedModel:
    """Put an adapter on each target of a model, in the dtype of its weights, and freeze all other parameters.

    Returns the model itself, whose target layers have become PEFT's. `seed` decides the initial adapters, alike on all
    ranks, whatever random numbers the caller has drawn.

    Raises:
        InputError: PEFT is not installed.
        ValueError: the model has no such target, or one is the LM head or no linear layer, as stacked experts are.
    """
    if find_spec("peft") is None:
        raise InputError("model.lora needs PEFT, which is not installed: pip install 'atpo-fast[lora]'")
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plain = plain_model(get_peft_model(model, peft_config(settings), autocast_adapter_dtype=False))
    check_mergeable(lora_layers(plain))
    head = plain.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"model.lora.targets={settings.targets}: the LM head cannot have an adapter, because the fused head works "
            "on its weight; name layers of the backbone, or all-linear, which leaves the head out"
        )
    return plain


def peft_config(settings: AdapterSettings) -> Any:
    """Return PEFT's `LoraConfig` of such adapters."""
    from peft import LoraConfig

    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    return LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )


def plain_model(model: Any) -> PreTrainedModel:
    """Return the Hugging Face model inside PEFT's `PeftModel`, with its adapters; any other model unchanged.

    Raises ValueError for prompt tuning and its like, which put tokens before the prompt.
    """
    if not hasattr(model, "get_base_model"):
        return model
    for config in model.peft_config.values():
        if config.is_prompt_learning:
            raise ValueError(
                f"{type(config).__module__}.{type(config).__name__} puts virtual tokens before the prompt, which "
                "packed rows do not have; use adapters inside the layers, such as LoRA"
            )
    plain: PreTrainedModel = model.get_base_model()
    return plain


def has_adapters(model: nn.Module) -> bool:
    """Tell whether layers of a model have PEFT's adapters."""
    return hasattr(model, "peft_config")


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Map the names of the layers with LoRA adapters to PEFT's modules, in the order of the model."""
    if not has_adapters(model):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def check_mergeable(layers: Mapping[str, Any]) -> None:
    """Raise ValueError unless each of `lora_layers` is a linear layer with one plain LoRA adapter."""
    for name, layer in layers.items():
        kind, variant = f"{type(layer).__module__}.{type(layer).__name__}", layer.lora_variant
        if kind != "peft.tuners.lora.layer.Linear" or variant:
            raise ValueError(
                f"{name} is a {kind}{f' with {variant}' if variant else ''}: only plain LoRA on linear layers can be "
                "merged; name linear layers in model.lora.targets, such as [q_proj, k_proj, v_proj, o_proj]"
            )
        if list(layer.lora_A) != [ADAPTER]:
            raise ValueError(f"{name} has the adapters {list(layer.lora_A)}; expected one, {ADAPTER!r}")


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Switch off all adapters for the time of a block: the model is then the one that they were put on.

    Their parameters take no gradient within the block.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def refuse_dropout(model: nn.Module) -> None:
    """Raise ValueError for a model with a dropout module that is not 0, that of adapters included.

    Branches share the tokens of a packed row, rows are forwarded again when they are opened or checkpointed, and the
    log-probs of the rollout know no dropout: what a row computes must not be drawn.
    """
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise ValueError(
                f"{name} is a {kind} with p={module.p:g}: packed rows need a policy without dropout; set it to 0 "
                "(lora_dropout=0 in PEFT's LoraConfig)"
            )
