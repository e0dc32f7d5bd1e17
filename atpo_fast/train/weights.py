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
    load_adapters,
    save_adapters,
    whole_weights,
)
from atpo_fast.config import Config, LoRAConfig
from atpo_fast.engines.weight_stream import in_buckets
from atpo_fast.policy import Policy, load_model

_BUCKET_BYTES = 256 << 20


def load_policy(config: Config, start: Path | str, checkpoint: Path | None = None) -> Policy:
    """Load the policy as it is at the start of a run, or as a checkpoint of it has it.

    With adapters (`model.lora`) it is always the model in `start`, with new adapters or with those of the checkpoint.
    """
    lora = config.model.lora
    folder = start if lora.rank or checkpoint is None else checkpoint / "hf"
    model = load_model(folder, getattr(torch, config.model.dtype))
    return Policy(
        with_adapters(model, lora, config.seed, checkpoint),
        temperature=config.rollout.temperature,
        gradient_checkpointing=config.model.gradient_checkpointing,
        liger=config.model.liger,
        router_balance=config.model.router_balance_coef,
        router_z=config.model.router_z_coef,
    )


def with_adapters(
    model: PreTrainedModel, lora: LoRAConfig, seed: int, checkpoint: Path | None = None
) -> PreTrainedModel:
    """Return the model with the adapters that are configured, if any: new ones, or those of a checkpoint.

    Raises what `add_adapters` raises.
    """
    if lora.adapters is None:
        return model
    adapted = add_adapters(model, lora.adapters, seed)
    if checkpoint is not None:
        load_adapters(adapted, checkpoint / "adapter")
    return adapted


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
    weights = gather_weights(policy, is_main=is_main)
    if is_main:
        write_model(policy, tokenizer, weights, folder)


def gather_weights(policy: Policy, *, is_main: bool) -> dict[str, Tensor]:
    """Copy the weights as they are now to the memory of the main rank; every rank calls, the others get nothing."""
    return _on_main(whole_parameters(policy), is_main)


def gather_adapters(policy: Policy, *, is_main: bool) -> dict[str, Tensor]:
    """Copy the weights of the adapters alone, as `gather_weights` does; nothing where there are none."""
    return _on_main(adapter_parameters(policy), is_main)


def _on_main(named: Iterable[tuple[str, Tensor]], is_main: bool) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, tensor in named:  # the other ranks take part too
        if is_main:
            weights[name] = tensor.to("cpu", copy=True)
    return weights


def write_model(policy: Policy, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor], folder: Path) -> None:
    """Write gathered weights as Hugging Face safetensors, with the policy's config and the tokenizer."""
    policy.model.save_pretrained(folder, state_dict=_with_tied(policy, weights))
    tokenizer.save_pretrained(folder)


def write_adapters(policy: Policy, weights: dict[str, Tensor], folder: Path) -> None:
    """Write gathered adapters as PEFT does."""
    save_adapters(policy.model.peft_config[ADAPTER], weights, folder)


def _with_tied(policy: Policy, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if policy.model.config.tie_word_embeddings and "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state
