"""Weights into a policy from disk, and whole ones out of it, partitioned or not: to the engine and to disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import deepspeed
from safetensors import safe_open
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
from atpo_fast.config import Config, LoRAConfig, ModelConfig
from atpo_fast.engines.weight_stream import in_buckets
from atpo_fast.policy import Policy
from atpo_fast.train.loading import load_for_training

_BUCKET_BYTES = 256 << 20
_SHARD_BYTES = 1 << 30
_WEIGHTS = "model.safetensors"
_LAYER = re.compile(r".*?\.layers\.\d+\.")


def load_policy(config: Config, start: Path | str, checkpoint: Path | None = None) -> Policy:
    """Load the policy as it is at the start of a run, or as a checkpoint of it has it; under ZeRO-3 a collective.

    With adapters (`model.lora`) it is always the model in `start`, with new adapters or with those of the checkpoint.
    """
    lora = config.model.lora
    folder = start if lora.rank or checkpoint is None else checkpoint / "hf"
    model = load_for_training(config, folder)
    return make_policy(with_adapters(model, lora, config.seed, checkpoint), config.model, config.rollout.temperature)


def make_policy(model: PreTrainedModel, config: ModelConfig, temperature: float = 1.0) -> Policy:
    """Make the policy of a model as it is configured to be trained, in the cold start and in RL alike."""
    return Policy(
        model,
        temperature=temperature,
        gradient_checkpointing=config.gradient_checkpointing,
        liger=config.liger,
        router_balance=config.router_balance_coef,
        router_z=config.router_z_coef,
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
    """Say how many parameters of a policy with adapters are trained."""
    sizes = [(int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in policy.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    whole = sum(size for size, _ in sizes)
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
    """Write Hugging Face safetensors, config and tokenizer; every rank calls, the main one writes.

    The main rank holds a shard at a time, not the model. Where it fails to write, it first goes on to take part in what
    the other ranks do.
    """
    weights = whole_parameters(policy)
    try:
        if is_main:
            write_model(policy, tokenizer, weights, folder)
    finally:
        for _ in weights:
            pass


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


def write_model(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    weights: Iterable[tuple[str, Tensor]],
    folder: Path,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write weights as Hugging Face safetensors, a shard at a time, with the policy's config and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    for shard in _shards(weights, shard_bytes):
        part = folder / f".part_{len(shards):05d}"
        policy.model.save_pretrained(part, state_dict=shard)
        shards.append(part)
    _join_shards(shards, folder)
    tokenizer.save_pretrained(folder)


def _shards(weights: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Yield copies of weights in the host's memory, in shards of about so many bytes that cut no decoder layer.

    A layer stays whole because some architectures store its weights joined in another way than they compute with them.
    """
    shard: dict[str, Tensor] = {}
    filled, layer = 0, ""
    for name, tensor in weights:
        found = _LAYER.match(name)
        here = found.group() if found else name
        if filled >= limit and here != layer:
            yield shard
            shard, filled = {}, 0
        shard[name], layer = tensor.to("cpu", copy=True), here
        filled += tensor.nbytes
    yield shard


def _join_shards(parts: list[Path], folder: Path) -> None:
    """Move the files of shards, a folder each, into one, with the index that Hugging Face reads several by."""
    places: dict[str, str] = {}
    size = 0
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else _WEIGHTS
        with safe_open(part / _WEIGHTS, "pt") as file:
            places |= dict.fromkeys(file.keys(), name)
        size += (part / _WEIGHTS).stat().st_size
        (part / _WEIGHTS).replace(folder / name)
        for path in part.iterdir():  # the configuration, the same beside every shard
            path.replace(folder / path.name)
        part.rmdir()
    if len(parts) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / f"{_WEIGHTS}.index.json").write_text(json.dumps(index, indent=1))


def write_adapters(policy: Policy, weights: dict[str, Tensor], folder: Path) -> None:
    """Write gathered adapters as PEFT does."""
    save_adapters(policy.model.peft_config[ADAPTER], weights, folder)
