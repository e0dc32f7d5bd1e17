"""Tree attention as a Hugging Face attention implementation.

`register()` makes `attn_implementation="atpo_tree"` known to transformers; the row's `subtree_end` and block lists
reach it as model keyword arguments, so nothing is global and any decoder that calls its attention through
`AttentionInterface` works (Llama, Qwen2, Qwen3, ...).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig

from atpo_kernels import make_attention_blocks, tree_attention

TREE_ATTENTION = "atpo_tree"


def register() -> None:
    """Tell transformers about `atpo_tree`; calling it twice does no harm."""
    AttentionInterface.register(TREE_ATTENTION, _tree_attention_forward)


def check_supported(config: PretrainedConfig) -> None:
    """Raise ValueError for models whose attention a packed tree would compute wrongly."""
    windowed = [t for t in getattr(config, "layer_types", None) or [] if t != "full_attention"]
    if windowed:
        raise ValueError(
            f"{config.model_type}: layers of type {sorted(set(windowed))} are not supported on packed trees; "
            "only full attention is (for Qwen models set use_sliding_window to false)"
        )
    if getattr(config, "use_sliding_window", False) and getattr(config, "sliding_window", None):
        raise ValueError(f"{config.model_type}: sliding-window attention is not supported on packed trees")
    if config.model_type in {"gpt_oss", "gemma2", "gemma3_text"}:
        raise ValueError(f"{config.model_type}: attention sinks and soft-capped scores are not supported")


def attention_blocks(
    config: PretrainedConfig,
    subtree_end: Tensor,  # (T,) on the host, or this waits for the device
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """What the attention of all layers of a row shares."""
    heads = config.num_attention_heads
    return make_attention_blocks(
        subtree_end,
        query_heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
        device=device,
    )


def _tree_attention_forward(
    module: torch.nn.Module,
    query: Tensor,  # (1, Hq, T, d)
    key: Tensor,  # (1, Hkv, T, d)
    value: Tensor,  # (1, Hkv, T, d)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    subtree_end: Tensor | None = None,  # (T,) int32
    tree_blocks: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if subtree_end is None or query.shape[0] != 1:
        raise ValueError("atpo_tree attends over one packed row: pass subtree_end= and a batch of 1")
    out = tree_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        subtree_end,
        blocks=tree_blocks,
        scale=scaling,
    )
    return out[None], None
