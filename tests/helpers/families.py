"""Tiny random models of every family that the documentation names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from atpo_fast.common.choices import GradientCheckpointing
from tests.helpers.hybrid_models import SIZES as HYBRID_SIZES
from tests.helpers.hybrid_models import VOCAB, hybrid_config

SIZES: dict[str, Any] = HYBRID_SIZES | {"bos_token_id": None, "eos_token_id": None}
WINDOW = 6
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True)
class Family:
    """A row of the table of supported models."""

    title: str
    config: Callable[[], PretrainedConfig]
    about: str
    """What its layers are, beside what the table's other columns say."""
    checkpointing: tuple[GradientCheckpointing, ...] = ("layer", "mlp")
    """What works of model.gradient_checkpointing."""


def _config(name: str, **options: Any) -> Callable[[], PretrainedConfig]:
    return lambda: getattr(transformers, f"{name}Config")(**(SIZES | {"num_hidden_layers": 3} | options))


FAMILIES = {
    "qwen2": Family("Qwen2, Qwen2.5", _config("Qwen2"), "full attention"),
    "qwen2-windowed": Family(
        "Qwen2 with use_sliding_window",
        _config("Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        "windows from one layer on",
    ),
    "qwen3": Family("Qwen3", _config("Qwen3", head_dim=8, tie_word_embeddings=True), "full attention"),
    "qwen3-moe": Family(
        "Qwen3-MoE", _config("Qwen3Moe", head_dim=8, num_experts=4, **EXPERTS), "full attention, experts"
    ),
    "llama": Family("Llama, SmolLM2", _config("Llama"), "full attention"),
    "mistral": Family("Mistral with a window", _config("Mistral", head_dim=8, sliding_window=WINDOW), "windows"),
    "gemma2": Family(
        "Gemma 2",
        _config("Gemma2", head_dim=8, sliding_window=WINDOW, layer_types=ALTERNATING, attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0, query_pre_attn_scalar=8),
        "windows and full attention, scores and logits with a soft cap",
    ),
    "gemma3": Family(
        "Gemma 3 (text)",
        _config("Gemma3Text", head_dim=8, sliding_window=WINDOW, layer_types=ALTERNATING, query_pre_attn_scalar=8),
        "windows and full attention",
    ),
    "gemma4": Family(
        "Gemma 4 (text)",
        _config("Gemma4Text", head_dim=8, global_head_dim=16, num_global_key_value_heads=1, attention_k_eq_v=True,
                sliding_window=WINDOW, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                hidden_size_per_layer_input=0, final_logit_softcapping=3.0, enable_moe_block=True, num_experts=4,
                top_k_experts=2, moe_intermediate_size=16),
        "windows and full attention with wider heads, experts, logits with a soft cap",
    ),
    "gemma4-small": Family(
        "Gemma 4 E2B, E4B (text)",
        _config("Gemma4Text", head_dim=8, global_head_dim=16, sliding_window=WINDOW, num_hidden_layers=4,
                layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=6,
                vocab_size_per_layer_input=VOCAB, num_kv_shared_layers=2),
        "the last layers read keys of earlier ones",
        checkpointing=("mlp",),
    ),
    "gpt-oss": Family(
        "gpt-oss",
        _config("GptOss", head_dim=8, sliding_window=WINDOW, layer_types=ALTERNATING, num_local_experts=4,
                num_experts_per_tok=2),
        "windows and full attention, sinks, experts",
    ),
    "olmo3": Family("OLMo 3", _config("Olmo3", sliding_window=WINDOW, layer_types=ALTERNATING), "windows"),
    "smollm3": Family(
        "SmolLM3",
        _config("SmolLM3", use_sliding_window=True, sliding_window=WINDOW, no_rope_layers=[1, 0, 1]),
        "layers without rotary positions, windows",
    ),
    "granite": Family("Granite 3", _config("Granite", logits_scaling=2.5), "full attention, scaled logits"),
    "qwen3_5": Family("Qwen3.5", partial(hybrid_config, "qwen3_5"), "Gated DeltaNet and full attention", ("layer",)),
    "qwen3_next": Family(
        "Qwen3-Next", partial(hybrid_config, "qwen3_next"), "Gated DeltaNet and full attention, experts", ("layer",)
    ),
    "nemotron_h": Family(
        "Nemotron-H", partial(hybrid_config, "nemotron_h"), "Mamba2, full attention, experts", ("layer",)
    ),
    "granitemoehybrid": Family(
        "Granite 4 hybrid", partial(hybrid_config, "granitemoehybrid"), "Mamba2, full attention, experts", ("layer",)
    ),
    "lfm2": Family("LFM2", partial(hybrid_config, "lfm2"), "short convolutions and full attention", ("layer",)),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float64, rounded: bool = False) -> PreTrainedModel:
    """The random model of a family, with every parameter away from 0, in the eager attention of transformers.

    Its numbers are those of float32, or if they are `rounded` of bfloat16.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        FAMILIES[name].config(), attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return (model.to(torch.bfloat16) if rounded else model).to(dtype)
