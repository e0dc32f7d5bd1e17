"""Tiny models with layers that have a state, one of each family, and float64 arithmetic throughout.

transformers computes states, norms and routing in float32 whatever the model's dtype; `in_float64` lifts that, so that
equalities can be checked to rounding of float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GraniteMoeHybridConfig,
    Lfm2Config,
    NemotronHConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
DELTA: dict[str, Any] = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
STATE = ["linear_attention", "full_attention", "linear_attention"]


def hybrid_config(name: str) -> PretrainedConfig:
    """The configuration of a family."""
    if name == "qwen3_5":
        return Qwen3_5TextConfig(**SIZES, **DELTA, num_hidden_layers=3, layer_types=STATE)
    if name == "qwen3_next":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        shared = {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}
        return Qwen3NextConfig(**SIZES, **DELTA, **experts, **shared, num_hidden_layers=3, layer_types=STATE)
    if name == "nemotron_h":
        mamba = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 6, "n_groups": 2, "chunk_size": 16}
        experts = {"n_routed_experts": 4, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16}
        types = ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"]
        return NemotronHConfig(**SIZES, **mamba, **experts, head_dim=8, layers_block_type=types)
    if name.startswith("granite"):
        mamba = {"mamba_n_heads": 4, "mamba_d_state": 6, "mamba_n_groups": 2, "mamba_chunk_size": 16}
        dense = name == "granite_dense"
        experts = {"num_local_experts": 0 if dense else 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16}
        factors = {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}
        return GraniteMoeHybridConfig(**SIZES, **mamba, **experts, **factors, num_hidden_layers=3, layer_types=STATE)
    types = ["conv", "full_attention", "conv"]
    return Lfm2Config(**SIZES, num_hidden_layers=3, layer_types=types, block_auto_adjust_ff_dim=False)


HYBRIDS = ("qwen3_5", "qwen3_next", "lfm2", "nemotron_h", "granitemoehybrid")
DENSE = ("qwen3_5", "lfm2", "granite_dense")  # one without experts for each kind of state


def make_hybrid(name: str) -> PreTrainedModel:
    """A tiny float64 model of a family; the same one for every call."""
    config = hybrid_config(name)
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).double()
    model.set_experts_implementation("eager")  # the default one has no float64
    return model


@contextmanager
def in_float64() -> Iterator[None]:
    """Let what transformers writes as float32 be float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(Tensor, "float", Tensor.double)
        yield
