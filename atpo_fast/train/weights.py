"""Weights into a policy from disk, and whole ones out of it, partitioned or not: to the engine and to disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import deepspeed
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atpo_fast.adapters import (
    ADAPTER,
    Weight,
    adapter_weights,
    add_adapters,
    has_adapters,
    save_adapters,
    whole_weights,
)
from atpo_fast.config import Config, LoRAConfig
from atpo_fast.engines.weight_stream import in_buckets
from atpo_fast.policy import Policy, load_model

_BUCKET_BYTES = 256 << 20


def load_policy(config: Config, folder: Path | str) -> Policy:
    """Load the policy from a Hugging Face folder, and put new adapters on it where `model.lora` asks for them."""
    model = load_model(folder, getattr(torch, config.model.dtype))
    return Policy(
        with_adapters(model, config.model.lora, config.seed),
        temperature=config.rollout.temperature,
        gradient_checkpointing=config.model.gradient_checkpointing,
        liger=config.model.liger,
    )


def with_adapters(model: PreTrainedModel, lora: LoRAConfig, seed: int) -> PreTrainedModel:
    """Return the model with the adapters that are configured, if any. Raises what `add_adapters` raises."""
    return model if lora.adapters is None else add_adapters(model, lora.adapters, seed)


def trained_line(policy: Policy) -> str:
    """Say how many parameters of a policy with adapters are trained. Before DeepSpeed partitions them."""
    parameters = list(policy.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in parameters)
    return f"LoRA: trains {trained:,} of {whole:,} parameters ({trained / whole:.2%})"


def whole_parameters(policy: Policy, bucket_bytes: int = _BUCKET_BYTES) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor) one at a time; under ZeRO-3 a collective on every rank.

    Parameters are gathered in buckets of at most `bucket_bytes` (a larger one by itself), so no rank ever holds more
    than a bucket beside its shards. A tensor is valid until the next one is asked for. Tied parameters come once, and
    adapters are merged into the weights of their layers.
    """
    return _gathered(whole_weights(policy.model), bucket_bytes)


def adapter_parameters(policy: Policy, bucket_bytes: int = _BUCKET_BYTES) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the model, full tensor) of the adapters alone, as `whole_parameters` does."""
    return _gathered(adapter_weights(policy.model), bucket_bytes)


def _gathered(weights: Iterable[Weight], bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
    for bucket in in_buckets(weights, lambda weight: weight.nbytes, bucket_bytes):
        parts = [p for weight in bucket for p in weight.parameters if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(parts, enabled=bool(parts)):
            for weight in bucket:
                yield weight.name, weight.make()


def export_model(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, *, is_main: bool) -> None:
    """Write Hugging Face safetensors, config and tokenizer; every rank calls, the main one writes."""
    state = _on_main(whole_parameters(policy), is_main)
    if is_main:
        policy.model.save_pretrained(folder, state_dict=_with_tied(policy, state))
        tokenizer.save_pretrained(folder)


def export_adapters(policy: Policy, folder: Path, *, is_main: bool) -> None:
    """Write PEFT's folder of a policy's adapters, if it has any; called as `export_model` is."""
    if not has_adapters(policy.model):
        return
    weights = _on_main(adapter_parameters(policy), is_main)
    if is_main:
        save_adapters(policy.model.peft_config[ADAPTER], weights, folder)


def _on_main(named: Iterable[tuple[str, Tensor]], is_main: bool) -> dict[str, Tensor]:
    """Copy all tensors to the CPU of the main rank; the others take part and keep nothing."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in named if is_main}


def _with_tied(policy: Policy, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if policy.model.config.tie_word_embeddings and "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state
