"""Fill cache nodes: forward the tokens that have slots but no keys and values yet (docs/design.md#prefix-sharing)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from atpo_fast.engines.paged.attention import AttentionGroup, PagedBatch, prefill_group
from atpo_fast.engines.paged.kv_cache import CacheNode, PrefixCache
from atpo_fast.engines.paged.model import PagedModel
from atpo_fast.engines.paged.states import START, SlotStates
from atpo_fast.recurrent.segments import Segments

_TOKENS_PER_FORWARD = 8192
_SCORES_PER_GROUP = 1 << 22  # largest padded queries x keys of one attention call
_PADDING = 1.5  # queries of one attention call differ in number by at most this factor


def fill(nodes: Sequence[CacheNode], model: PagedModel, cache: PrefixCache) -> None:
    """Forward every token of `nodes` that is not filled yet, and keep each node's last hidden state.

    Parents must be filled or among `nodes`. Nodes at different depths take one pass per depth.
    """
    pending = list(nodes)
    while pending:
        ready = [node for node in pending if node.parent is None or node.parent.filled == len(node.parent.tokens)]
        _fill_some(ready, model, cache)
        pending = [node for node in pending if node.filled < len(node.tokens)]


def _fill_some(ready: list[CacheNode], model: PagedModel, cache: PrefixCache) -> None:
    """Make one forward pass over as many tokens of `ready` as fit."""
    ready.sort(key=lambda node: len(node.tokens) - node.filled)
    lengths = np.array([len(node.tokens) - node.filled for node in ready])
    count = max(1, int(np.searchsorted(lengths.cumsum(), _TOKENS_PER_FORWARD, side="right")))
    chosen, lengths = ready[:count], np.minimum(lengths[:count], _TOKENS_PER_FORWARD)
    first = np.array([node.start + node.filled for node in chosen])
    spans = [slice(node.filled, node.filled + length) for node, length in zip(chosen, lengths, strict=True)]
    tokens = np.concatenate([node.tokens[span] for node, span in zip(chosen, spans, strict=True)])
    slots = np.concatenate([node.slots[span] for node, span in zip(chosen, spans, strict=True)])
    positions = np.concatenate([np.arange(p, p + n) for p, n in zip(first, lengths, strict=True)])
    groups = _groups(chosen, first, lengths, model.device)
    device = model.device
    paged = PagedBatch(cache.pool, torch.from_numpy(slots).to(device), groups)
    states = _states(chosen, lengths, cache, device)
    hidden = model.forward(torch.from_numpy(tokens).to(device), torch.from_numpy(positions).to(device), paged, states)
    cache.counters.forwarded_tokens += len(tokens)
    last = hidden[torch.from_numpy(lengths.cumsum() - 1).to(device)]
    for row, node in enumerate(chosen):
        node.filled += int(lengths[row])
        node.hidden = last[row] if node.filled == len(node.tokens) else None


def _states(
    nodes: list[CacheNode], lengths: NDArray[np.int64], cache: PrefixCache, device: torch.device
) -> SlotStates | None:
    """Make the states of one forward pass: each node's own, or its parent's where none of its tokens is filled."""
    if cache.states is None:
        return None
    above = [START if node.parent is None else node.parent.state for node in nodes]
    source = [node.state if node.filled else state for node, state in zip(nodes, above, strict=True)]
    slots, targets = (torch.tensor(x, device=device) for x in (source, [node.state for node in nodes]))
    return cache.states.states(slots, targets, Segments.with_own_heads(lengths, device))


def _groups(
    nodes: list[CacheNode],
    first: NDArray[np.int64],  # (n,) position of each node's first query
    lengths: NDArray[np.int64],  # (n,) queries of each node, ascending
    device: torch.device,
) -> list[AttentionGroup]:
    """Cut the nodes into attention calls of similar numbers of queries and bounded size."""
    ends = first + lengths
    offsets = lengths.cumsum() - lengths
    groups, start = [], 0
    for stop in range(1, len(nodes) + 1):
        if stop < len(nodes):
            keys = ends[start : stop + 1].max()
            scores = (stop + 1 - start) * lengths[stop] * keys
            if scores <= _SCORES_PER_GROUP and lengths[stop] <= _PADDING * lengths[start]:
                continue
        table = np.zeros((stop - start, int(ends[start:stop].max())), dtype=np.int64)
        for row, node in enumerate(nodes[start:stop]):
            slots = path_slots(node)[: ends[start + row]]
            table[row, : len(slots)] = slots
        part = [torch.from_numpy(values[start:stop]).to(device) for values in (first, lengths)]
        groups.append(prefill_group(torch.from_numpy(table).to(device), part[0], part[1], int(offsets[start])))
        start = stop
    return groups


def path_slots(node: CacheNode) -> NDArray[np.int64]:
    """Concatenate the slots of all tokens from the root through `node`."""
    return np.concatenate([part.slots for part in node.path])
