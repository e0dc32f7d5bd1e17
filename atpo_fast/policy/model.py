"""Making and loading the Hugging Face model behind the policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

if TYPE_CHECKING:
    from atpo_fast.config import ModelConfig


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The model at `config.path`, or a random Qwen3 of the configured sizes with the tokenizer's vocabulary.

    Raises FileNotFoundError when the path is not a model folder.
    """
    dtype = getattr(torch, config.dtype)
    if config.path is not None:
        return load_model(config.path, dtype)
    torch.manual_seed(seed)
    sizes = model_sizes(config)
    sizes.vocab_size = -(-len(tokenizer) // 8) * 8
    sizes.eos_token_id, sizes.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return AutoModelForCausalLM.from_config(sizes, dtype=dtype)  # .to(dtype) would round the rotary frequencies too


def model_sizes(config: ModelConfig) -> PretrainedConfig:
    """Hugging Face's description of the model: that at `config.path`, or of the random one, but for its vocabulary.

    Raises FileNotFoundError when the path is not a model folder.
    """
    if config.path is not None:
        return AutoConfig.from_pretrained(_model_folder(config.path))
    return Qwen3Config(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tie_embeddings,
        initializer_range=config.initializer_range,
        bos_token_id=None,
    )


def load_model(path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """A causal LM from a local Hugging Face folder."""
    return AutoModelForCausalLM.from_pretrained(_model_folder(path), dtype=dtype)


def _model_folder(path: str | Path) -> str | Path:
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"model.path={path}: no config.json there; give a Hugging Face model folder")
    return path
