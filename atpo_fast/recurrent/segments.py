"""The segments of a packed row: runs of tokens through which a layer's state passes without a branch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Level:
    """The segments that start together: the state of each is known once the level before is done."""

    count: int  # n
    width: int  # S, tokens of the longest
    source: Tensor  # (n,) int64 segment of the level before whose end state each starts from; a head on the first level


@dataclass(frozen=True, slots=True)
class Windows:
    """A row with W inputs before each of its N segments, so that a causal convolution of width W+1 runs over all of it.

    Indices are into the inputs of the heads (H * W), followed by those of the row (T).
    """

    extended: Tensor  # (N * W + T,) int64 input at each place
    own: Tensor  # (T,) int64 place of each token of the row
    last: Tensor  # (N * W,) int64 last W inputs of the path that ends with each segment


class Segments:
    """The segments (N) of a row of T tokens, in the order of the row, and the order in which states pass through them.

    A segment continues another one of the row, or a **head**: a state from before the row.

    Args:
        start: (N,) first token of each segment; they fill the row.
        tokens: T.
        parent: (N,) the segment that each continues, an earlier one; -1 - h for head h.
        device: where the index tensors are wanted.
    """

    def __init__(self, start: Ints, tokens: int, parent: Ints, device: torch.device):
        self.start, self.tokens, self.parent, self.device = start, tokens, parent, device
        self.length: Ints = np.diff(start, append=tokens)
        self.heads = int(max(0, -parent.min()))
        self._windows: dict[int, Windows] = {}

    @classmethod
    def of_trees(cls, subtree_end: Tensor, device: torch.device) -> Segments:  # (T,)
        """Cut a row of trees at its branches; all roots continue head 0. Waits for the device if the tensor is there.

        Neighbours with the same `subtree_end` lie on one path with no branch in between, so a turn and its only child
        are one segment.
        """
        end = subtree_end.cpu().numpy().astype(np.int64)
        start = np.flatnonzero(np.diff(end, prepend=-1))
        parent = np.full(len(start), -1, dtype=np.int64)
        open_: list[int] = []  # segments on the path to the current one
        for number, first in enumerate(start.tolist()):
            while open_ and end[start[open_[-1]]] <= first:
                open_.pop()
            if open_:
                parent[number] = open_[-1]
            open_.append(number)
        return cls(start, len(end), parent, device)

    @classmethod
    def with_own_heads(cls, lengths: Ints, device: torch.device) -> Segments:  # (N,)
        """Make a row of independent segments, of which segment i continues head i."""
        return cls(np.cumsum(lengths) - lengths, int(lengths.sum()), -1 - np.arange(len(lengths)), device)

    @cached_property
    def levels(self) -> list[Level]:
        """The levels, first to last; a segment is one level below the segment that it continues."""
        source = np.where(self.parent < 0, -1 - self.parent, self._place[np.maximum(self.parent, 0)])
        return [
            Level(len(members), int(self.length[members].max()), self._tensor(source[members]))
            for members in self._members
        ]

    @cached_property
    def padded(self) -> Tensor:
        """The token at each place of all levels' padded batches, (P,), P the sum of n * S; T where there is none."""
        tables = []
        for members in self._members:
            step = np.arange(self.length[members].max())
            inside = step < self.length[members][:, None]
            tables.append(np.where(inside, self.start[members][:, None] + step, self.tokens).ravel())
        return self._tensor(np.concatenate(tables))

    @cached_property
    def unpadded(self) -> Tensor:
        """The place of each token in the padded batches, (T,)."""
        padded = self.padded.cpu().numpy()
        found = np.flatnonzero(padded < self.tokens)
        place = np.empty(self.tokens, dtype=np.int64)
        place[padded[found]] = found
        return self._tensor(place)

    def windows(self, width: int) -> Windows:
        """Find the `width` inputs before each segment on its path, and the last of each path."""
        if width not in self._windows:
            self._windows[width] = self._make_windows(width)
        return self._windows[width]

    def _make_windows(self, width: int) -> Windows:
        head = self.heads * width  # inputs of the heads, before those of the row
        before = np.arange(head + self.tokens) - 1  # input before each on its path
        last = head + self.start + self.length - 1
        before[head + self.start] = (
            np.where(self.parent < 0, -1 - self.parent, 0) * width + width - 1
        )  # the last one of a head
        inner = self.parent >= 0
        before[head + self.start[inner]] = last[self.parent[inner]]
        number = np.repeat(np.arange(len(self.start)), self.length)
        own = np.arange(self.tokens) + (number + 1) * width
        extended = np.empty(len(self.start) * width + self.tokens, dtype=np.int64)
        extended[own] = head + np.arange(self.tokens)
        tails = np.empty((len(self.start), width), dtype=np.int64)
        into, at = before[head + self.start], last
        place = self.start + np.arange(len(self.start)) * width
        for step in reversed(range(width)):
            extended[place + step] = into
            tails[:, step] = at
            into, at = before[into], before[at]
        return Windows(self._tensor(extended), self._tensor(own), self._tensor(tails.ravel()))

    @cached_property
    def _members(self) -> list[Ints]:
        """The segments of each level, in the order of the row."""
        depth = np.zeros(len(self.start), dtype=np.int64)
        for number, parent in enumerate(self.parent.tolist()):
            depth[number] = depth[parent] + 1 if parent >= 0 else 0
        return [np.flatnonzero(depth == level) for level in range(int(depth.max()) + 1)]

    @cached_property
    def _place(self) -> Ints:
        """The place of each segment on its level, (N,)."""
        place = np.empty(len(self.start), dtype=np.int64)
        for members in self._members:
            place[members] = np.arange(len(members))
        return place

    def _tensor(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self.device)
