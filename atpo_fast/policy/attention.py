"""Tree attention as a Hugging Face attention implementation.

`register()` makes `attn_implementation="atpo_tree"` known to transformers; the row's `subtree_end` and block lists
reach it as model keyword arguments, so nothing is global and any decoder that calls its attention through
`AttentionInterface` works (Llama, Qwen2, Qwen3, ...).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig

from atpo_fast.policy.opened_rows.prefix import RowPrefix
from atpo_fast.recurrent.layers import NEEDED, known_types
from atpo_kernels import make_attention_blocks, tree_attention

TREE_ATTENTION = "atpo_tree"


def register() -> None:
    """Make `atpo_tree` known to transformers; calling it twice does no harm."""
    AttentionInterface.register(TREE_ATTENTION, _tree_attention_forward)


def check_supported(config: PretrainedConfig) -> None:
    """Raise ValueError for models whose attention a packed tree would compute wrongly."""
    unknown = {t for t in getattr(config, "layer_types", None) or [] if t != "full_attention"} - known_types(config)
    if unknown:
        raise ValueError(
            f"{config.model_type}: layers of type {sorted(unknown)} are not supported on packed trees; full attention "
            f"is (for Qwen models set use_sliding_window to false), and layers with a state in {', '.join(NEEDED)}"
        )
    if getattr(config, "use_sliding_window", False) and getattr(config, "sliding_window", None):
        raise ValueError(f"{config.model_type}: sliding-window attention is not supported on packed trees")
    if config.model_type in {"gpt_oss", "gemma2", "gemma3_text"}:
        raise ValueError(f"{config.model_type}: attention sinks and soft-capped scores are not supported")


def head_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """Return the numbers of query heads and of key heads of a model, and the width of a head."""
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, key_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def attention_blocks(
    config: PretrainedConfig,
    subtree_end: Tensor,  # (T,) on the host, or this waits for the device
    dtype: torch.dtype,
    device: torch.device,
    prefix_tokens: int = 0,
) -> Any:
    """Make the block lists that the attention of all layers of a row shares."""
    heads, key_heads, width = head_shape(config)
    return make_attention_blocks(
        subtree_end,
        query_heads=heads,
        key_heads=key_heads,
        head_dim=width,
        dtype=dtype,
        device=device,
        prefix=prefix_tokens,
    )


def prefix_token_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Compute the bytes that one token of a row's prefix takes.

    They hold its keys and values, twice because a row's graph has them behind one another, their gradients in float32,
    and its layers' outputs. Layers with a state keep one for the whole row, which is not counted.
    """
    _, key_heads, width = head_shape(config)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    attending = sum(kind not in known_types(config) for kind in kinds)
    keys = 2 * key_heads * width * (2 * dtype.itemsize + 4)
    return attending * keys + config.num_hidden_layers * config.hidden_size * dtype.itemsize


def _tree_attention_forward(
    module: torch.nn.Module,
    query: Tensor,  # (1, Hq, T, d)
    key: Tensor,  # (1, Hkv, T, d)
    value: Tensor,  # (1, Hkv, T, d)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    subtree_end: Tensor | None = None,  # (T,) int32
    tree_blocks: Any = None,
    row_prefix: RowPrefix | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if subtree_end is None or query.shape[0] != 1:
        raise ValueError("atpo_tree attends over one packed row: pass subtree_end= and a batch of 1")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if row_prefix is not None:
        k, v = row_prefix.extend(cast(int, module.layer_idx), k, v)
    return tree_attention(q, k, v, subtree_end, blocks=tree_blocks, scale=scaling)[None], None
