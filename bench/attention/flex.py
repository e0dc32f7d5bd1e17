"""Attention over a row of trees by PyTorch's FlexAttention, with a BlockMask built from block lists.

No (T, T) mask exists. It is compiled on CUDA; on the CPU it runs eagerly and without gradients.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from atpo_kernels.tree_attention import BlockSizes, make_tree_block_lists

if TYPE_CHECKING:  # takes long to import
    from torch.nn.attention.flex_attention import BlockMask

_BLOCK = 128  # tokens of a block of queries and of keys: FlexAttention's own


def make_flex_mask(subtree_end: Tensor, prefix: int = 0) -> BlockMask:
    """Make the BlockMask of a row (T,), read on the host, for T queries and `prefix` + T keys on its device.

    `subtree_end` itself is looked at in partial blocks only.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tokens = subtree_end.numel()
    lists = make_tree_block_lists(subtree_end, BlockSizes(_BLOCK, _BLOCK, _BLOCK, _BLOCK), prefix=prefix)
    end = F.pad(subtree_end, (prefix, 0), value=tokens)  # (P + T,)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key - prefix <= query) & (query < end[key])

    columns = ceil((prefix + tokens) / _BLOCK)
    mask = BlockMask.from_kv_blocks(
        *_padded(lists.partial_offsets, lists.partial, columns),
        *_padded(lists.full_offsets, lists.full, columns),
        BLOCK_SIZE=_BLOCK,
        mask_mod=sees,
        seq_lengths=(tokens, prefix + tokens),
    )
    return mask.to(subtree_end.device)


def tree_attention_flex(
    q: Tensor,  # (T, Hq, d)
    k: Tensor,  # (P + T, Hkv, d)
    v: Tensor,  # (P + T, Hkv, d)
    subtree_end: Tensor,  # (T,)
    *,
    blocks: BlockMask | None = None,
    scale: float | None = None,
) -> Tensor:  # (T, Hq, d)
    """Compute `tree_attention` by FlexAttention. `blocks` is the row's `make_flex_mask`.

    Raises ValueError for blocks of another row or prefix.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    if q.shape[0] == 0:
        return q * 1.0
    blocks = make_flex_mask(subtree_end, len(k) - len(q)) if blocks is None else blocks
    if not isinstance(blocks, BlockMask) or blocks.shape[-2:] != (len(q), len(k)):
        raise ValueError("tree_attention_flex: blocks are those of make_flex_mask of the row and prefix")
    attend = _compiled() if q.device.type == "cuda" else flex_attention
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    out = attend(*heads_first, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    """Compile FlexAttention for any shape: a row of another length is not another kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _padded(offsets: Tensor, blocks: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Pad a CSR (B + 1,), (L,): numbers of blocks (1, 1, B), the blocks in front of zeros (1, 1, B, columns); int32."""
    counts = offsets.diff()
    rows = torch.arange(len(counts)).repeat_interleave(counts.long())
    places = torch.arange(len(blocks)) - offsets[:-1][rows]
    padded = torch.zeros(len(counts), columns, dtype=torch.int32)
    padded[rows, places] = blocks
    return counts[None, None], padded[None, None]
