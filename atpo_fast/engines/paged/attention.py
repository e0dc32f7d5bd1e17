"""Attention of packed tokens over a pool of cache slots, as a Hugging Face attention function (docs/design.md#engines).

Tokens of all requests are packed into one row (1, T), so the model's linear layers see no padding. The attention
function writes their keys and values into the pool, gathers each request's keys and values by its slots, and attends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from atpo_fast.engines.paged.kv_cache import SlotPool

ATTENTION = "atpo_paged"


class Padding(NamedTuple):
    """The map from a group's t packed tokens to b x S padded queries, and back."""

    pad: Tensor  # (b * S,) int64 token for each padded query
    unpad: Tensor  # (t,) int64 padded query of each token


@dataclass(slots=True)
class AttentionGroup:
    """A group of `b` requests in one attention call, padded to `S` queries and `L` keys.

    `padding` is None when each request has exactly one query (decoding).
    """

    start: int  # the group's tokens are packed rows [start, stop)
    stop: int
    slots: Tensor  # (b * L,) int64 slots of each request's path, padded with any slot
    mask: Tensor  # (b, 1, S or 1, L) bool: the query at position p sees keys 0..p of its path
    padding: Padding | None = None


@dataclass(slots=True)
class PagedBatch:
    """The inputs of a forward pass beside the tokens; layers get it as the model argument `paged`."""

    pool: SlotPool
    write_slots: Tensor  # (T,) int64 slots of the tokens' keys and values
    groups: list[AttentionGroup]


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, Hq, T, d)
    key: Tensor,  # (1, Hkv, T, d)
    value: Tensor,  # (1, Hkv, T, d)
    attention_mask: Tensor | None,
    *,
    paged: PagedBatch,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend over the pool; return (1, T, Hq, d), as `AttentionInterface` wants it."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    heads, width = key.shape[1], key.shape[3]
    paged.pool.write(layer, paged.write_slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    rows = query[0].transpose(0, 1)  # (T, Hq, d)
    parts = []
    for group in paged.groups:
        length = group.mask.shape[-1]
        stored = paged.pool.read(layer, group.slots).view(-1, length, 2, heads, width)
        keys, values = stored[:, :, 0].transpose(1, 2), stored[:, :, 1].transpose(1, 2)  # (b, Hkv, L, d)
        parts.append(_attend(rows[group.start : group.stop], keys, values, group, scaling))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _attend(
    rows: Tensor,  # (t, Hq, d)
    keys: Tensor,  # (b, Hkv, L, d)
    values: Tensor,  # (b, Hkv, L, d)
    group: AttentionGroup,
    scaling: float | None,
) -> Tensor:
    """Attend in one group; return (t, Hq, d). Query heads that share a key head become further queries of that head."""
    batch, heads, _, width = keys.shape
    shared = rows.shape[1] // heads
    if group.padding is None:
        query = rows.reshape(batch, heads, shared, width)
        out = scaled_dot_product_attention(query, keys, values, attn_mask=group.mask, scale=scaling)
        return out.reshape(batch, heads * shared, width)
    query = rows.reshape(len(rows), -1).index_select(0, group.padding.pad)
    query = query.view(batch, -1, heads, shared, width).permute(0, 2, 3, 1, 4)  # (b, Hkv, Hq/Hkv, S, d)
    queries = query.shape[3]
    out = scaled_dot_product_attention(
        query.reshape(batch, heads, shared * queries, width),
        keys,
        values,
        attn_mask=group.mask.repeat(1, 1, shared, 1),
        scale=scaling,
    )
    out = out.view(batch, heads, shared, queries, width).permute(0, 3, 1, 2, 4)
    out = out.reshape(batch * queries, -1).index_select(0, group.padding.unpad)
    return out.view(len(rows), heads * shared, width)


def decode_group(
    table: Tensor,  # (R, L) int64 slots of each path, padded
    positions: Tensor,  # (R,) int64 position of the one query per path
    start: int,
) -> AttentionGroup:
    """Build the group of R requests that decode one token each, at packed rows [start, start + R)."""
    keys = torch.arange(table.shape[1], device=table.device)
    mask = (keys <= positions[:, None])[:, None, None]
    return AttentionGroup(start, start + len(table), table.reshape(-1), mask)


def prefill_group(
    table: Tensor,  # (b, L) int64 slots of each path, padded
    first: Tensor,  # (b,) int64 position of each request's first query
    lengths: Tensor,  # (b,) int64 number of queries of each request
    start: int,
) -> AttentionGroup:
    """Build the group of b requests whose consecutive queries are packed, request after request, from row `start`."""
    device = table.device
    total, longest = int(lengths.sum()), int(lengths.max())
    steps = torch.arange(longest, device=device)
    valid = steps < lengths[:, None]  # (b, S)
    offsets = lengths.cumsum(0) - lengths
    pad = torch.where(valid, offsets[:, None] + steps, 0)
    mask = torch.arange(table.shape[1], device=device) <= (first[:, None] + steps)[:, :, None]
    unpad = valid.reshape(-1).nonzero()[:, 0]
    return AttentionGroup(start, start + total, table.reshape(-1), mask[:, None], Padding(pad.reshape(-1), unpad))


AttentionInterface.register(ATTENTION, paged_attention)
