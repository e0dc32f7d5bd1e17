"""Tiny models of every family, and trees for them, for the tests of the policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from atpo_fast import TurnTree, assign_credit

VOCAB = 50
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
}


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().double()


def grad_of(parameter: Tensor) -> Tensor:
    """The gradient of a parameter, which has one."""
    assert parameter.grad is not None
    return parameter.grad


def trees() -> list[TurnTree]:
    rng = np.random.default_rng(3)
    out = []
    for t in range(2):
        tree = TurnTree(rng.integers(0, VOCAB, 7), question_id=str(t))
        a = tree.add_turn(0, rng.integers(0, VOCAB, 5), observation_ids=rng.integers(0, VOCAB, 6))
        b = tree.add_turn(a, rng.integers(0, VOCAB, 1))
        c = tree.add_turn(a, rng.integers(0, VOCAB, 4))
        d = tree.add_turn(0, rng.integers(0, VOCAB, 3))
        for leaf, reward in ((b, 1.0), (c, 0.0), (d, 0.0)):
            tree.set_reward(leaf, reward)
        out.append(tree)
    assign_credit(out)
    return out
