"""Keys and values of tree tokens: a pool of slots, and a cache that hands them to turns.

See docs/design.md#prefix-sharing.

A cache node holds the slots of one turn's tokens (its action and its observation) and is named by the turn's key, so
chains, siblings and expansion rounds that pass through a turn share its entries whatever their tokens are. Where layers
have a state it also holds the slot of the one after its tokens, from which those that continue the turn start. What
the prompts of several trees begin with is a node of its own, above their roots.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atpo_fast.engines.base import EngineCounters, TurnKey
from atpo_fast.engines.paged.shared_prompts import SharedPrompt
from atpo_fast.engines.paged.states import START, StatePool

Slots = NDArray[np.int64]

_SMALLEST_POOL = 1024
_EVICTION_SHARE = 64  # evict at least this share (1/n) of the budget at once, so that the search for victims is rare


class SlotPool:
    """A tensor (capacity, 2 * Hkv * d) of keys and values for each layer, allocated at the layer's first write.

    The capacity doubles as needed, up to `limit`; layers follow at their next write.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.layers: dict[int, Tensor] = {}
        self._capacity = 0
        self._free: Slots = np.empty(limit, dtype=np.int64)  # a stack; the first `free` entries are unused slots
        self.free = 0

    @property
    def available(self) -> int:
        """Number of slots that can be allocated."""
        return self.free + self.limit - self._capacity

    def allocate(self, count: int) -> Slots:
        """Allocate (count,) unused slots; at most `available`."""
        while self.free < count:
            self._grow()
        self.free -= count
        return self._free[self.free : self.free + count].copy()

    def release(self, slots: Slots) -> None:
        """Take back slots that are used no more."""
        self._free[self.free : self.free + len(slots)] = slots
        self.free += len(slots)

    def clear(self) -> None:
        """Take every slot back and drop the tensors."""
        self.layers.clear()
        self._capacity = self.free = 0

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store `key` and `value` (T, Hkv, d) at `slots` (T,)."""
        rows = torch.stack((key, value), dim=1).view(len(slots), -1)
        store = self.layers.get(layer)
        if store is None or len(store) < self._capacity:
            grown = rows.new_zeros(self._capacity, rows.shape[1])
            if store is not None:
                grown[: len(store)] = store
            self.layers[layer] = store = grown
        store.index_copy_(0, slots, rows)

    def read(self, layer: int, slots: Tensor) -> Tensor:
        """Read (n, 2 * Hkv * d), keys then values, at `slots` (n,); two dimensions are many times faster to gather."""
        return self.layers[layer].index_select(0, slots)

    def _grow(self) -> None:
        capacity = min(max(_SMALLEST_POOL, 2 * self._capacity), self.limit)
        new = np.arange(self._capacity, capacity, dtype=np.int64)[::-1]
        self._capacity = capacity
        self.release(new)


@dataclass(slots=True, eq=False)
class CacheNode:
    """One turn's cache entries: `slots[:filled]` hold keys and values of `tokens[:filled]`."""

    key: TurnKey
    parent: CacheNode | None
    start: int  # position of the first token on the path
    tokens: NDArray[np.int64]
    slots: Slots
    filled: int = 0
    counted: int = 0  # number of tokens that `prefilled_tokens` has counted
    hidden: Tensor | None = None  # (D,) hidden state of the last token, once that is filled
    state: int = START  # slot of the state after `tokens[:filled]`
    pins: int = 0  # number of requests in progress that pass through the node
    used: int = 0  # time of the last use

    @property
    def path(self) -> list[CacheNode]:
        """Nodes from the root to this one, both included."""
        nodes, node = [self], self.parent
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class PrefixCache:
    """A cache of nodes by key within a budget of slots, which evicts the least recently used.

    Args:
        pool: slots of tokens.
        counters: the engine's.
        states: slots of states; None for models without.
    """

    def __init__(self, pool: SlotPool, counters: EngineCounters, states: StatePool | None = None):
        self.pool, self.states = pool, states
        self.counters = counters
        self.nodes: dict[TurnKey, CacheNode] = {}
        self._trees: dict[Hashable, set[TurnKey]] = {}
        self._users: dict[TurnKey, int] = {}  # of each shared beginning: number of trees below it
        self._evictable = 0  # number of slots of nodes that nobody has pinned
        self._unpinned = 0  # number of these nodes
        self._clock = 0

    @property
    def available(self) -> int:
        """Number of slots that can be allocated, by eviction where needed."""
        return self.pool.available + self._evictable

    def allocate(self, count: int) -> Slots:
        """Allocate (count,) slots, at most `available`, and evict unpinned nodes for them where needed."""
        if self.pool.available < count:
            self._evict(max(count - self.pool.available, self.pool.limit // _EVICTION_SHARE))
        return self.pool.allocate(count)

    def has_states(self, count: int) -> bool:
        """Whether `count` slots of states can be allocated, by eviction where needed."""
        return self.states is None or count <= self.states.available + self._unpinned

    def allocate_state(self) -> int:
        """Allocate a slot for a state, and evict unpinned nodes where needed; `START` for models without."""
        if self.states is None:
            return START
        if not self.states.available:
            self._evict(0, max(1, self.states.limit // _EVICTION_SHARE))
        return self.states.allocate()

    def release_state(self, slot: int) -> None:
        """Take back the slot of a state."""
        if self.states is not None:
            self.states.release(slot)

    def add(self, node: CacheNode) -> None:
        """Add a new node, whose slots then belong to the cache."""
        self.nodes[node.key] = node
        self._trees.setdefault(node.key[0], set()).add(node.key)
        if isinstance(node.key[0], SharedPrompt):
            self._users[node.key] = 0
        elif (above := self._beginning_above(node)) is not None:
            self.counters.shared_tokens += node.start if self._users[above] else 0
            self._users[above] += 1
        self._evictable += 0 if node.pins else len(node.slots)
        self._unpinned += not node.pins
        self.touch(node)

    def extend(self, node: CacheNode, tokens: NDArray[np.int64]) -> None:
        """Give a pinned node all its tokens, and slots to those of them that have none (see `allocate`)."""
        self.counters.prefilled_tokens += len(tokens) - node.counted
        node.counted = len(tokens)
        node.tokens = tokens
        node.slots = np.concatenate([node.slots, self.allocate(len(tokens) - len(node.slots))])
        node.hidden = None

    def pin(self, nodes: Iterable[CacheNode]) -> None:
        """Keep nodes from being evicted until `unpin`."""
        for node in nodes:
            if not node.pins:
                self._evictable -= len(node.slots)
                self._unpinned -= 1
            node.pins += 1

    def unpin(self, nodes: Iterable[CacheNode]) -> None:
        """Remove one pin of each node; a node without pins may be evicted."""
        for node in nodes:
            node.pins -= 1
            if not node.pins:
                self._evictable += len(node.slots)
                self._unpinned += 1

    def touch(self, node: CacheNode) -> None:
        """Mark a node and its ancestors as used just now."""
        self._clock += 1
        for ancestor in node.path:
            ancestor.used = self._clock

    def release_tree(self, tree: Hashable) -> None:
        """Forget the nodes of one tree, none of which may be pinned, and beginnings that it shared with none left."""
        for key in self._trees.pop(tree, set()):
            self._free(self.nodes.pop(key))
        for key in [key for key, users in self._users.items() if not users]:
            self._drop(self.nodes[key])

    def clear(self) -> None:
        """Forget everything and drop the pool's tensors."""
        self.nodes.clear()
        self._trees.clear()
        self._users.clear()
        self._evictable = self._unpinned = 0
        self.pool.clear()
        if self.states is not None:
            self.states.clear()

    def _evict(self, count: int, states: int = 0) -> None:
        """Drop least recently used nodes, children before parents.

        Go on until `count` slots of tokens and `states` of states are freed, or no node is left.
        """
        victims = [node for node in self.nodes.values() if not node.pins]
        victims.sort(key=lambda node: (node.used, -node.start))  # no parent was used before its children
        freed = 0
        for dropped, node in enumerate(victims):
            if freed >= count and dropped >= states:
                break
            freed += len(node.slots)
            self._drop(node)
        self.counters.evicted_tokens += freed

    def _drop(self, node: CacheNode) -> None:
        del self.nodes[node.key]
        keys = self._trees[node.key[0]]
        keys.discard(node.key)
        if not keys:
            del self._trees[node.key[0]]
        self._free(node)

    def _free(self, node: CacheNode) -> None:
        """Take back the slots of a node that nobody has pinned."""
        self._evictable -= len(node.slots)
        self._unpinned -= 1
        self._users.pop(node.key, None)
        if (above := self._beginning_above(node)) is not None:
            self._users[above] -= 1
        self.pool.release(node.slots)
        self.release_state(node.state)

    def _beginning_above(self, node: CacheNode) -> TurnKey | None:
        """Return the shared beginning that a tree's root continues; None for any other node."""
        return node.parent.key if node.parent is not None and node.parent.key in self._users else None
