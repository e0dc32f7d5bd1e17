"""States of layers that have one, a slot for each turn in the cache and each request that is decoded.

See docs/design.md#recurrent-layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atpo_fast.recurrent.carried import CarriedStates
from atpo_fast.recurrent.segments import Segments

START = 0  # the slot of the state before the first token: zeros, never written

_SMALLEST_POOL = 64


class StatePool:
    """A tensor (capacity, ...) for each layer's recurrence and for its convolution's last inputs, made when written.

    The capacity doubles as needed, up to `limit` slots beside `START`.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._free: list[int] = []
        self._capacity = 1
        self._recurrent: dict[int, Tensor] = {}
        self._inputs: dict[int, Tensor] = {}

    @property
    def available(self) -> int:
        """Number of slots that can be allocated."""
        return len(self._free) + self.limit + 1 - self._capacity

    def allocate(self) -> int:
        """Allocate an unused slot; there must be one."""
        if not self._free:
            capacity = min(max(_SMALLEST_POOL, 2 * self._capacity), self.limit + 1)
            self._free.extend(range(capacity - 1, self._capacity - 1, -1))
            self._capacity = capacity
        return self._free.pop()

    def release(self, slot: int) -> None:
        """Take back a slot that is used no more."""
        self._free.append(slot)

    def clear(self) -> None:
        """Take every slot back and drop the tensors."""
        self._free, self._capacity = [], 1
        self._recurrent.clear()
        self._inputs.clear()

    def copy(self, source: Tensor, target: Tensor) -> None:  # (n,), (n,)
        """Copy the states of all layers from some slots to others."""
        for stores, inputs in ((self._recurrent, False), (self._inputs, True)):
            for layer, store in list(stores.items()):
                self.write(layer, target, store.index_select(0, source), inputs=inputs)

    def states(self, slots: Tensor, targets: Tensor, segments: Segments) -> SlotStates:  # (N,), (N,)
        """Make the states of a row whose segment i starts from slot `slots[i]` and ends in slot `targets[i]`."""
        return SlotStates(self, slots, targets, segments)

    def read(self, layer: int, slots: Tensor, *, inputs: bool = False) -> Tensor | None:
        """Read the states at `slots` (n,), or the last inputs, (n, ...); None where none has been written yet."""
        store = (self._inputs if inputs else self._recurrent).get(layer)
        return None if store is None else store.index_select(0, slots)

    def write(self, layer: int, slots: Tensor, values: Tensor, *, inputs: bool = False) -> None:
        """Store states, or last inputs, (n, ...) at `slots` (n,)."""
        stores = self._inputs if inputs else self._recurrent
        store = stores.get(layer)
        if store is None or len(store) < self._capacity:
            grown = values.new_zeros(self._capacity, *values.shape[1:])
            if store is not None:
                grown[: len(store)] = store
            stores[layer] = store = grown
        store.index_copy_(0, slots, values)


class SlotStates(CarriedStates):
    """The states of a row of independent segments, each in slots of the pool."""

    def __init__(self, pool: StatePool, slots: Tensor, targets: Tensor, segments: Segments):
        self.pool, self.slots, self.targets, self.segments = pool, slots, targets, segments

    def continue_inputs(self, layer: int, own: Tensor, width: int) -> Tensor:  # (T, C) -> (N * width + T, C)
        """Put the last inputs of each segment's slot before the row's, and store what comes out."""
        heads = self.pool.read(layer, self.slots, inputs=True)
        shape = (len(self.slots), width, own.shape[1])
        before = own.new_zeros(shape) if heads is None else heads
        known = torch.cat([before.view(-1, shape[2]), own])
        last = known.index_select(0, self.segments.windows(width).last)
        self.pool.write(layer, self.targets, last.view(shape), inputs=True)
        return known

    def initial(self, layer: int, like: Tensor) -> Tensor | None:
        """Read the states that the segments start from, (N, ...)."""
        return self.pool.read(layer, self.slots)

    def final(self, layer: int, out: Tensor, states: Tensor) -> Tensor:  # (T, ...), (N, ...) -> (T, ...)
        """Store the segments' end states."""
        self.pool.write(layer, self.targets, states)
        return out
