"""Weights into a policy from disk, and whole ones out of it, partitioned or not: to the engine and to disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedTokenizerBase

from atpo_fast.config import Config
from atpo_fast.engines.weight_stream import in_buckets
from atpo_fast.policy import Policy, load_model

_BUCKET_BYTES = 256 << 20


def load_policy(config: Config, folder: Path | str) -> Policy:
    """Load the policy from a Hugging Face folder."""
    return Policy(
        load_model(folder, getattr(torch, config.model.dtype)),
        temperature=config.rollout.temperature,
        gradient_checkpointing=config.model.gradient_checkpointing,
        liger=config.model.liger,
    )


def whole_parameters(policy: Policy, bucket_bytes: int = _BUCKET_BYTES) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor) one at a time; under ZeRO-3 a collective on every rank.

    Parameters are gathered in buckets of at most `bucket_bytes` (a larger one by itself), so no rank ever holds more
    than a bucket beside its shards. A tensor is valid until the next one is asked for. Tied parameters come once.
    """
    for bucket in in_buckets(policy.model.named_parameters(), _nbytes, bucket_bytes):
        parts = [parameter for _, parameter in bucket if hasattr(parameter, "ds_id")]
        with deepspeed.zero.GatheredParameters(parts, enabled=bool(parts)):
            for name, parameter in bucket:
                yield name, parameter.detach()


def _nbytes(named: tuple[str, Parameter]) -> int:
    parameter = named[1]
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()


def export_model(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, *, is_main: bool) -> None:
    """Write Hugging Face safetensors, config and tokenizer; every rank calls, the main one writes."""
    weights = gather_weights(policy, is_main=is_main)
    if is_main:
        write_model(policy, tokenizer, weights, folder)


def gather_weights(policy: Policy, *, is_main: bool) -> dict[str, Tensor]:
    """Copy the weights as they are now to the memory of the main rank; every rank calls, the others get nothing."""
    weights: dict[str, Tensor] = {}
    for name, tensor in whole_parameters(policy):
        if is_main:
            weights[name] = tensor.to("cpu", copy=True)
    return weights


def write_model(policy: Policy, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor], folder: Path) -> None:
    """Write gathered weights as Hugging Face safetensors, with the policy's config and the tokenizer."""
    policy.model.save_pretrained(folder, state_dict=_with_tied(policy, weights))
    tokenizer.save_pretrained(folder)


def _with_tied(policy: Policy, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if policy.model.config.tie_word_embeddings and "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state
