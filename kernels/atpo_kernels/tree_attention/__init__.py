"""Attention over packed search trees: every token sees its own path and nothing else (docs/design.md#mask)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from atpo_kernels.devices import eager, kernel_context, processors, target_of
from atpo_kernels.dispatch import choose
from atpo_kernels.tree_attention.block_lists import TreeBlockLists, make_tree_block_lists
from atpo_kernels.tree_attention.reference import AttentionOptions, tree_attention_reference
from atpo_kernels.tree_attention.tiles import BlockSizes, block_sizes, has_tiles, tiles_for
from atpo_kernels.tree_attention.torch_impl import TreeBlocks, make_tree_blocks, tree_attention_torch

__all__ = [
    "AttentionBlocks",
    "BlockSizes",
    "TreeBlockLists",
    "TreeBlocks",
    "make_attention_blocks",
    "make_tree_block_lists",
    "make_tree_blocks",
    "tree_attention",
]

AttentionBlocks = TreeBlocks | TreeBlockLists | None
"""What `make_attention_blocks` makes of a row, by implementation."""
_PATHS: dict[str, Callable[..., Tensor]] = {"torch": tree_attention_torch, "reference": tree_attention_reference}


@eager
def tree_attention(
    q: Tensor,  # (T, Hq, d)
    k: Tensor,  # (P + T, Hkv, d)
    v: Tensor,  # (P + T, Hkv, d)
    subtree_end: Tensor,  # (T,) int32
    *,
    window: int | None = None,
    sinks: Tensor | None = None,  # (Hq,)
    softcap: float | None = None,
    blocks: AttentionBlocks = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:  # (T, Hq, d)
    """Attend within a row of trees, each laid out in depth-first pre-order with one copy of every token.

        mask = (index <= index[:, None]) & (index[:, None] < subtree_end)    # index = arange(T); [query, key]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)  # heads first

    Query i sees key j iff j <= i < subtree_end[j], where subtree_end[j] is the index after the last token of the
    subtree of j's turn. Trees in a row do not see one another. k and v may begin with a prefix of P >= 0 more tokens
    than q, the ancestors of a row that continues others: every query sees all of them, and key P + j is the row's token
    j. Query heads are grouped over key heads as usual: query head h reads key head h // (Hq / Hkv). `scale`, positive,
    defaults to 1/sqrt(d). Output in the dtype of q; scores and softmax of half-precision inputs are float32 ("torch",
    "triton"). Differentiable in q, k, v and sinks; T = 0 is allowed. `blocks`, built once per row, prefix and window by
    `make_attention_blocks`, serve all its layers and steps. Without them every call builds them, which reads
    subtree_end on the host and so waits for the device.

    `window` W restricts a query to the last W keys of its path, itself included: position[q] - position[k] < W, where
    the position of a token is the number of tokens before it on its path, the prefix included. `sinks` are logits that
    join the softmax of every query of a head and have no value (gpt-oss). `softcap` c, positive, makes the scores
    c * tanh(scale * q . k / c) (Gemma 2).

    `impl`:
      "auto"       "triton" for CUDA tensors of a dtype and head width that it takes, else "torch"
      "triton"     Triton kernels on lists of full and partial blocks (TreeBlockLists); heads of up to 256 dimensions in
                   half precision, 128 in float32; on CPU tensors in Triton's interpreter
      "torch"      visits the visible keys of each block of queries (TreeBlocks); any device and dtype
      "reference"  the definition, with the dense mask; takes no blocks

    Raises ValueError for shapes, dtypes or devices that do not fit, blocks of another row, prefix or
    implementation; RuntimeError for Triton kernels that cannot run here.
    """
    _check(q, k, v, subtree_end)
    options = AttentionOptions(q.shape[-1] ** -0.5 if scale is None else scale, window, softcap)
    _check_sinks(sinks, q)
    _check_blocks(blocks, len(q), len(k) - len(q), window)
    run = _choose(impl, q.device, q.dtype, q.shape[-1])
    with kernel_context(q):
        return run(q, k, v, sinks, subtree_end, options, blocks)


def make_attention_blocks(
    subtree_end: Tensor,  # (T,) int32
    *,
    query_heads: int,
    key_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    impl: str = "auto",
    prefix: int = 0,
    window: int | None = None,
    softcap: float | None = None,
) -> AttentionBlocks:
    """Build the `blocks` of a row that `tree_attention` takes, for tensors of this shape, dtype and device.

    `prefix` is how many more tokens k and v have than q; `window` and `softcap` are those of the attention. `device`
    defaults to that of subtree_end. The blocks are built on the host, so give subtree_end on the CPU, and nothing waits
    for the device; they are copied to it on the current stream, for which another stream that uses them has to wait.
    None for implementations that use no blocks. Raises ValueError if subtree_end is not that of depth-first pre-order,
    or prefix is negative.
    """
    if prefix < 0:
        raise ValueError(f"make_attention_blocks: prefix must be the number of tokens before the row, got {prefix}")
    device = subtree_end.device if device is None else torch.device(device)
    path = _choose(impl, device, dtype, head_dim)
    if path is tree_attention_torch:
        return make_tree_blocks(subtree_end, prefix=prefix, window=window)
    if path is tree_attention_reference:
        return None
    tiles = tiles_for(target_of(device), dtype, head_dim, softcap is not None)
    sizes = block_sizes(tiles, query_heads // key_heads)
    lists = make_tree_block_lists(
        subtree_end, sizes, key_heads=key_heads, workers=processors(device), prefix=prefix, window=window
    )
    return lists.to(device)


def _choose(impl: str, device: torch.device, dtype: torch.dtype, width: int) -> Callable[..., Tensor]:
    """Choose the implementation; "auto" passes by kernels that do not have heads of this width."""
    if impl == "auto" and not has_tiles(dtype, width):
        impl = "torch"
    return choose("tree_attention", impl, device, _PATHS, dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor) -> None:
    """Raise ValueError unless the tensors of `tree_attention` fit together."""
    tokens = q.shape[0]
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, subtree_end {tuple(subtree_end.shape)}"
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or k.shape[2] != q.shape[2]:
        raise ValueError(f"tree_attention: q must be (T, Hq, d), k and v (P + T, Hkv, d), got {shapes}")
    if k.shape[0] < tokens:
        raise ValueError(f"tree_attention: k and v must have every token of q, and those of a prefix, got {shapes}")
    if q.shape[1] == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"tree_attention: the query heads must be a multiple of the key heads, got {shapes}")
    if subtree_end.shape != (tokens,) or subtree_end.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tree_attention: subtree_end must be ({tokens},) int32, got {subtree_end.dtype}, {shapes}")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"tree_attention: q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if len({x.device for x in (q, k, v, subtree_end)}) != 1:
        raise ValueError("tree_attention: q, k, v and subtree_end must be on one device")


def _check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    """Raise ValueError unless the sinks are one logit a query head, on the device of q."""
    if sinks is None:
        return
    if sinks.shape != q.shape[1:2] or not sinks.is_floating_point() or sinks.device != q.device:
        raise ValueError(
            f"tree_attention: sinks must be ({q.shape[1]},) floating-point numbers on {q.device}, "
            f"got {tuple(sinks.shape)} {sinks.dtype} on {sinks.device}"
        )


def _check_blocks(blocks: AttentionBlocks, tokens: int, prefix: int, window: int | None) -> None:
    """Raise ValueError unless the blocks are of a row of this size, behind this prefix, and for this window."""
    if blocks is None:
        return
    if (blocks.tokens, blocks.prefix) != (tokens, prefix):
        raise ValueError(
            f"tree_attention: blocks are of a row of {blocks.tokens} tokens behind a prefix of {blocks.prefix}, "
            f"but q has {tokens} tokens and k and v have {prefix} more"
        )
    if blocks.window != window:
        raise ValueError(f"tree_attention: blocks are for window={blocks.window}, but here window={window}")
