"""Whole parameters out of a (possibly partitioned) policy: to the inference engine and to disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import deepspeed
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atpo_fast.policy import Policy


def whole_parameters(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) one at a time; under ZeRO-3 a collective on every rank.

    A tensor is valid until the next one is asked for. Tied parameters come once.
    """
    for name, parameter in policy.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            yield name, parameter.detach()


def export_model(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, *, is_main: bool) -> None:
    """Write Hugging Face safetensors, config and tokenizer; every rank calls, the main one writes."""
    state: dict[str, Tensor] = {}
    for name, tensor in whole_parameters(policy):
        if is_main:
            state[name] = tensor.to("cpu", copy=True)
    if is_main:
        policy.model.save_pretrained(folder, state_dict=_with_tied(policy, state))
        tokenizer.save_pretrained(folder)


def _with_tied(policy: Policy, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if policy.model.config.tie_word_embeddings and "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state
