"""Build the parts of a run from its configuration: the objective, the model behind the policy, the rows' budget.

Credit, packing, objective and policy take plain arguments and know nothing of the configuration; this module does.
"""

from __future__ import annotations

import dataclasses

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from atpo_fast.config import Config, ModelConfig
from atpo_fast.config.arithmetic import longest_path
from atpo_fast.objective import Objective
from atpo_fast.policy.attention import prefix_token_bytes
from atpo_fast.policy.model import load_model, model_folder


def make_objective(config: Config) -> Objective:
    """Make the objective of the preset that the configuration names, with its departures."""
    max_length = config.rollout.max_response_tokens
    return Objective.preset(config.objective.preset, max_length=max_length, **config.objective.departures)


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Load the model at `config.path`, or make a random one of the configured sizes with the tokenizer's vocabulary.

    Raises FileNotFoundError and ValueError as `model_sizes` does.
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
    """Describe the model at `config.path`, or the random one but for its vocabulary, in Hugging Face's terms.

    Raises:
        FileNotFoundError: the path is not a model folder.
        ValueError: `config.architecture` names a model type that transformers does not have, or a field that this type
            does not have or that is one of the sizes.
    """
    if config.path is not None:
        return AutoConfig.from_pretrained(model_folder(config.path)).get_text_config()  # of a multimodal model
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": None,
    }
    fields = {"model_type": "qwen3"} | config.architecture
    kind = str(fields.pop("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model.architecture: transformers has no model_type {kind}")
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[kind])} - sizes.keys()
    if wrong := fields.keys() - known:
        raise ValueError(
            f"model.architecture: {', '.join(sorted(wrong))}: no field of the configuration of {kind}, or one of the "
            "sizes that other keys of the section model set"
        )
    return AutoConfig.for_model(kind, **sizes, **fields)


def max_prefix(config: Config, objective: Objective) -> int:
    """Compute how many tokens of a row's prefix `train.prefix_memory_gb` has room for.

    It is 0 for objectives of whole trajectories. Raises ValueError when the longest trajectory fits neither a row nor a
    row and such a prefix.
    """
    rows, longest, memory = config.train.row_tokens, longest_path(config), config.train.prefix_memory_gb
    token_bytes = prefix_token_bytes(model_sizes(config.model), getattr(torch, config.model.dtype))
    tokens = 0 if objective.whole_trajectories else int(memory * 1e9 / token_bytes)
    if longest > rows + tokens:
        reason = (
            "an objective of whole trajectories (level sequence or denominator local) allows for no prefix"
            if objective.whole_trajectories
            else f"train.prefix_memory_gb={memory:g} has room for a prefix of {tokens} ({token_bytes} bytes each)"
        )
        raise ValueError(
            f"the longest trajectory has {longest} tokens, a row train.row_tokens={rows}, and {reason}; raise "
            f"train.row_tokens to at least {longest - tokens}"
        )
    return tokens
