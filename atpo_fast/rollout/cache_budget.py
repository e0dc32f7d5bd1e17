"""Decide how many questions are searched at once (docs/design.md#search)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from atpo_fast.rollout.branch import QuestionSearch

_USAGE_MARGIN = 1.25  # headroom over what the largest tree used


class CacheBudget:
    """An estimate of whether a tree fits into the engine's cache beside those that are growing.

    A tree is expected to use as many tokens a branch as the largest of the last roll-out or of those finished since
    (before the first: as many as the limits allow). A wrong guess costs evictions in the engine, never correctness.

    Args:
        cache_tokens: size of the engine's cache in tokens.
        branches: number of leaves of a full tree before any is pruned.
    """

    def __init__(self, cache_tokens: int, branches: int) -> None:
        self.cache_tokens, self.branches = cache_tokens, branches
        self._before = self._since = 0.0  # most tokens a branch in the last roll-out, and since then

    def begin(self) -> None:
        """Begin a new roll-out, whose estimates start from those of the last one."""
        self._before, self._since = self._since or self._before, 0.0

    def finished(self, search: QuestionSearch) -> None:
        """Learn from a tree that has grown to its end."""
        self._since = max(self._since, (search.tokens - search.prompt_tokens) / self.branches)

    def has_room(self, growing: Iterable[QuestionSearch], search: QuestionSearch) -> bool:
        """Tell whether `search` is expected to fit beside those that are growing."""
        return sum(map(self._expected, growing)) + self._expected(search) <= self.cache_tokens

    def _expected(self, search: QuestionSearch) -> float:
        used = _USAGE_MARGIN * max(self._before, self._since) or np.inf
        prompt = search.prompt_tokens
        return max(search.tokens, prompt + self.branches * min(search.token_limit - prompt, used))
