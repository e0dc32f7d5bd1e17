"""What prompts of different trees begin with, such as a system prompt (docs/design.md#prefix-sharing)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from atpo_fast.engines.base import TurnKey

Ints = NDArray[np.int64]

LEAST = 64  # tokens that two prompts must have in common: fewer are not worth a forward pass of their own
_GROUPS = 8  # groups remembered


class SharedPrompt(NamedTuple):
    """The name of the cache entries that trees share, in the place of a tree's: the bytes of their token ids."""

    tokens: bytes


@dataclass(slots=True, eq=False)
class _Group:
    """Prompts of `count` trees that begin with the same `tokens`, (n,)."""

    tokens: Ints
    count: int = 1


class SharedPrompts:
    """The beginnings of the prompts that a batch of requests has in common, found by comparing their tokens.

    A prompt joins the group with which it has most tokens in common, and shortens its beginning to these; a group of
    several trees is not shortened to less than half. So questions behind one system prompt come to share that prompt,
    whatever some of them have in common beyond it.
    """

    def __init__(self) -> None:
        self._groups: list[_Group] = []  # the most recently joined last
        self._known: set[TurnKey] = set()

    def add(self, key: TurnKey, prompt: Ints) -> None:
        """Take note of the prompt (p,) of a tree, whose first turn has this key."""
        if key in self._known or len(prompt) <= LEAST:
            return
        self._known.add(key)
        length, group = 0, _Group(prompt)
        for other in self._groups:
            common = min(_common(prompt, other.tokens), len(prompt) - 1)
            worthwhile = other.count == 1 or 2 * common >= len(other.tokens)
            if worthwhile and common >= max(LEAST, length + 1):
                length, group = common, other
        if length:
            group.tokens, group.count = group.tokens[:length], group.count + 1
            self._groups.remove(group)
        self._groups = [*self._groups, group][-_GROUPS:]

    def beginning(self, prompt: Ints) -> Ints | None:
        """Return the longest beginning (n,), n < p, that this prompt (p,) shares with another tree's; None without."""
        shared = [group.tokens for group in self._groups if group.count > 1 and len(group.tokens) < len(prompt)]
        fitting = [tokens for tokens in shared if np.array_equal(tokens, prompt[: len(tokens)])]
        return max(fitting, key=len, default=None)


def _common(first: Ints, second: Ints) -> int:
    """Count the tokens with which both begin."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
