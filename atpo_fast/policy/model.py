"""Making and loading the Hugging Face model behind the policy."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config

from atpo_fast.config.schema import ModelConfig


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The model at `config.path`, or a random Qwen3 of the configured sizes with the tokenizer's vocabulary.

    Raises FileNotFoundError when the path is not a model folder.
    """
    dtype = getattr(torch, config.dtype)
    if config.path is not None:
        return load_model(config.path, dtype)
    torch.manual_seed(seed)
    sizes = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tie_embeddings,
        initializer_range=config.initializer_range,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(sizes, dtype=dtype)  # .to(dtype) would round the rotary frequencies too


def load_model(path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """A causal LM from a local Hugging Face folder."""
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"model.path={path}: no config.json there; give a Hugging Face model folder")
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
