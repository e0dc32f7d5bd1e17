"""Tree attention as a Hugging Face attention implementation.

`register()` makes `attn_implementation="atpo_tree"` known to transformers; the row's `subtree_end` and block lists
reach it as model keyword arguments, so nothing is global and any decoder that calls its attention through
`AttentionInterface` works (Llama, Qwen2, Qwen3, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from atpo_fast.models.layers import describe_layers, find_problems
from atpo_fast.policy.opened_rows.prefix import RowPrefix
from atpo_kernels import make_attention_blocks, tree_attention
from atpo_kernels.tree_attention import AttentionBlocks

TREE_ATTENTION = "atpo_tree"


def register() -> None:
    """Make `atpo_tree` known to transformers; calling it twice does no harm."""
    AttentionInterface.register(TREE_ATTENTION, _tree_attention_forward)


def check_supported(model: PreTrainedModel) -> None:
    """Raise ValueError for a model of which a packed tree would compute something wrongly, with every reason."""
    if problems := find_problems(model):
        raise ValueError(f"{model.config.model_type}: {'; '.join(problems)}")


class RowBlocks:
    """The block lists of one row, made for each shape and window of attention when a first layer asks for them.

    Args:
        windows: that of every layer, as the model's configuration has them; None: full attention.
        subtree_end: (T,) of the row; on the host, or this waits for the device.
        prefix_tokens: tokens of the rows above.
    """

    def __init__(self, windows: Sequence[int | None], prefix_tokens: int, subtree_end: Tensor):
        self._windows, self._subtree_end, self._prefix = windows, subtree_end.cpu(), prefix_tokens
        self._made: dict[tuple[Any, ...], AttentionBlocks] = {}

    def of(
        self,
        layer: int,
        query: Tensor,  # (T, Hq, d)
        key: Tensor,  # (T, Hkv, d)
        window: int | None,
        softcap: float | None,
    ) -> AttentionBlocks:
        """Return the lists for tensors of these shapes.

        Raises ValueError where a layer passes on another window than its configuration has: then only the masks of
        that architecture know the window, and nobody asks them.
        """
        if window != self._windows[layer]:
            raise ValueError(
                f"layer {layer} attends with sliding_window={window}, but its configuration says "
                f"{self._windows[layer]}: this architecture is not supported on trees"
            )
        shape = (query.shape[1], key.shape[1], query.shape[2], query.dtype, query.device, window, softcap)
        if shape not in self._made:
            heads, key_heads, width, dtype, device, *_ = shape
            self._made[shape] = make_attention_blocks(
                self._subtree_end,
                query_heads=heads,
                key_heads=key_heads,
                head_dim=width,
                dtype=dtype,
                device=device,
                prefix=self._prefix,
                window=window,
                softcap=softcap,
            )
        return self._made[shape]


def prefix_token_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Compute the bytes that one token of a row's prefix takes.

    They hold its keys and values, twice because a row's graph has them behind one another, their gradients in float32,
    and its layers' outputs. Layers with a state keep one for the whole row, which is not counted.
    """
    layers = describe_layers(config)
    held = sum(2 * layer.key_heads * layer.head_dim for layer in layers if layer.attends) * (2 * dtype.itemsize + 4)
    return held + len(layers) * config.hidden_size * dtype.itemsize


def _tree_attention_forward(
    module: torch.nn.Module,
    query: Tensor,  # (1, Hq, T, d)
    key: Tensor,  # (1, Hkv, T, d)
    value: Tensor,  # (1, Hkv, T, d)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (Hq,) sinks
    subtree_end: Tensor | None = None,  # (T,) int32
    tree_blocks: RowBlocks | None = None,
    row_prefix: RowPrefix | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if subtree_end is None or tree_blocks is None or query.shape[0] != 1:
        raise ValueError("atpo_tree attends over one packed row: pass subtree_end=, tree_blocks= and a batch of 1")
    if dropout:
        raise ValueError(f"attention over trees has no dropout, but this layer asks for {dropout}")
    layer = cast(int, module.layer_idx)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    blocks = tree_blocks.of(layer, q, k, sliding_window, softcap)
    if row_prefix is not None:
        k, v = row_prefix.extend(layer, k, v)
    out = tree_attention(
        q, k, v, subtree_end, window=sliding_window, sinks=s_aux, softcap=softcap, blocks=blocks, scale=scaling
    )
    return out[None], None
