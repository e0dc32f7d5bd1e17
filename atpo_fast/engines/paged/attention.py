"""Attention of packed tokens over a pool of cache slots, as a Hugging Face attention function (docs/design.md#engines).

Tokens of all requests are packed into one row (1, T), so the model's linear layers see no padding. The attention
function writes their keys and values into the pool, gathers each request's keys and values by its slots, and attends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
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


class Keys(NamedTuple):
    """The keys that a group's queries may see, for one window: `b` requests of `S` queries and `L` keys."""

    slots: Tensor  # (b * L,) int64 slots of the end of each request's path, padded with any slot
    mask: Tensor  # (b, 1, S or 1, L) bool: which of them each query sees


@dataclass(slots=True)
class AttentionGroup:
    """A group of `b` requests in one attention call, padded to `S` queries.

    `padding` is None when each request has exactly one query (decoding).
    """

    start: int  # the group's tokens are packed rows [start, stop)
    stop: int
    table: Tensor  # (b, L) int64 slots of each request's path, padded with any slot
    first: Tensor  # (b,) int64 position of each request's first query
    queries: int  # S
    padding: Padding | None = None
    _keys: dict[int | None, Keys] = field(default_factory=dict)

    def keys(self, window: int | None) -> Keys:
        """Choose the keys of layers with this window: all of the path without one, made once for all of them.

        The query at position p sees keys 0..p of its path, or the last `window` of them.
        """
        if window not in self._keys:
            self._keys[window] = self._choose(window)
        return self._keys[window]

    def _choose(self, window: int | None) -> Keys:
        length, device = self.table.shape[1], self.table.device
        query = self.first[:, None] + torch.arange(self.queries, device=device)  # (b, S)
        if window is None:
            key = torch.arange(length, device=device)
            return Keys(self.table.reshape(-1), (key <= query[:, :, None])[:, None])
        begin = (self.first - (window - 1)).clamp(min=0)
        key = begin[:, None] + torch.arange(min(length, window - 1 + self.queries), device=device)  # (b, L)
        slots = self.table.gather(1, key.clamp(max=length - 1))
        distance = query[:, :, None] - key[:, None]
        return Keys(slots.reshape(-1), ((distance >= 0) & (distance < window))[:, None])


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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (Hq,) sinks
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend over the pool; return (1, T, Hq, d), as `AttentionInterface` wants it."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = None if s_aux is None else s_aux.view(key.shape[1], -1)
    layer: int = module.layer_idx  # type: ignore[assignment]
    heads, width = key.shape[1], key.shape[3]
    paged.pool.write(layer, paged.write_slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    rows = query[0].transpose(0, 1)  # (T, Hq, d)
    parts = []
    for group in paged.groups:
        seen = group.keys(sliding_window)
        stored = paged.pool.read(layer, seen.slots).view(-1, seen.mask.shape[-1], 2, heads, width)
        keys, values = stored[:, :, 0].transpose(1, 2), stored[:, :, 1].transpose(1, 2)  # (b, Hkv, L, d)
        attend = partial(_attention, keys=keys, values=values, scale=scale, softcap=softcap)
        parts.append(_attend(rows[group.start : group.stop], heads, group, seen.mask, sinks, attend))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _attend(
    rows: Tensor,  # (t, Hq, d)
    heads: int,  # Hkv
    group: AttentionGroup,
    mask: Tensor,  # (b, 1, S or 1, L)
    sinks: Tensor | None,  # (Hkv, Hq/Hkv)
    attend: Callable[..., Tensor],
) -> Tensor:
    """Attend in one group; return (t, Hq, d). Query heads that share a key head become further queries of that head."""
    batch, shared, width = len(group.table), rows.shape[1] // heads, rows.shape[2]
    if group.padding is None:
        out = attend(rows.reshape(batch, heads, shared, width), mask=mask, sinks=sinks)
        return out.reshape(batch, heads * shared, width)
    query = rows.reshape(len(rows), -1).index_select(0, group.padding.pad)
    query = query.view(batch, -1, heads, shared, width).permute(0, 2, 3, 1, 4)  # (b, Hkv, Hq/Hkv, S, d)
    queries = query.shape[3]
    out = attend(
        query.reshape(batch, heads, shared * queries, width),
        mask=mask.repeat(1, 1, shared, 1),
        sinks=None if sinks is None else sinks.repeat_interleave(queries, 1),
    )
    out = out.view(batch, heads, shared, queries, width).permute(0, 3, 1, 2, 4)
    out = out.reshape(batch * queries, -1).index_select(0, group.padding.unpad)
    return out.view(len(rows), heads * shared, width)


def _attention(
    query: Tensor,  # (b, Hkv, M, d)
    *,
    keys: Tensor,  # (b, Hkv, L, d)
    values: Tensor,  # (b, Hkv, L, d)
    mask: Tensor,  # (b, 1, M or 1, L)
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,  # (Hkv, M)
) -> Tensor:  # (b, Hkv, M, d)
    """Attend by PyTorch's fused function, or step by step where it lacks soft caps and sinks; softmax in float32."""
    if softcap is None and sinks is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = (query @ keys.transpose(2, 3)).to(torch.promote_types(query.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        beside = sinks.to(scores.dtype)[None, :, :, None].expand(len(scores), -1, -1, 1)
        return torch.cat([scores, beside], -1).softmax(-1)[..., :-1].to(values.dtype) @ values
    return scores.softmax(-1).to(values.dtype) @ values


def decode_group(
    table: Tensor,  # (R, L) int64 slots of each path, padded
    positions: Tensor,  # (R,) int64 position of the one query per path
    start: int,
) -> AttentionGroup:
    """Build the group of R requests that decode one token each, at packed rows [start, start + R)."""
    return AttentionGroup(start, start + len(table), table, positions, queries=1)


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
    unpad = valid.reshape(-1).nonzero()[:, 0]
    return AttentionGroup(start, start + total, table, first, longest, Padding(pad.reshape(-1), unpad))


AttentionInterface.register(ATTENTION, paged_attention)
