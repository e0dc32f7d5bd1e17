"""What an engine with a prefix cache of its own remembers of unfinished trees, to check what it is asked to continue.

Text that is decoded and encoded again, or a template that rewrites earlier turns, changes tokens silently: the engine
then continues, and the trainer learns from, something that the policy never wrote. Here that is an error which names
the first differing token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atpo_fast.engines.base import Request, TurnKey

Ints = NDArray[np.int64]


@dataclass(slots=True)
class _Turn:
    """Tokens of a turn: those it wrote, and its observation once a request has brought it."""

    start: int  # where they begin in the path
    ids: Ints
    observed: bool  # `ids` is the whole turn
    entered: int  # tokens of the path up to here that the engine has forwarded


class LiveTurns:
    """Turns of unfinished trees by key."""

    def __init__(self) -> None:
        self._trees: dict[Hashable, dict[int, _Turn]] = defaultdict(dict)
        self._asked: set[TurnKey] = set()  # turns being written

    def admit(self, requests: Sequence[Request]) -> list[int]:
        """Check the prompts of requests and remember the observations in them; all or none.

        Returns how many tokens of each are known to have been forwarded.

        Raises:
            ValueError: a path contradicts its prompt, a turn exists already, or a prompt is not what the engine wrote
                and was shown before; the message names the first differing token.
        """
        news: dict[TurnKey, _Turn] = {}
        asked: set[TurnKey] = set()
        entered = []
        for request in requests:
            key = request.turn_key
            if key in asked or key in self._asked or self._find(key) is not None:
                raise ValueError(f"turn {key} has been requested already; every turn needs its own key")
            asked.add(key)
            entered.append(self._check(request, news))
        for key, turn in news.items():
            self._trees[key[0]][key[1]] = turn
        self._asked |= asked
        return entered

    def written(self, request: Request, token_ids: Sequence[int]) -> None:
        """Remember a completion; its last token has not been forwarded."""
        start = len(request.prompt_ids)
        parent = self._find(request.path[-1].key)
        assert parent is not None
        parent.entered = start
        self._asked.discard(request.turn_key)
        tree, number = request.turn_key
        ids = np.asarray(token_ids, dtype=np.int64)
        self._trees[tree][number] = _Turn(start, ids, observed=False, entered=start + len(ids) - 1)

    def dropped(self, request: Request) -> None:
        """The turn is not going to be written."""
        self._asked.discard(request.turn_key)

    def release(self, tree: Hashable) -> None:
        """Forget a tree, of which nothing is being written."""
        self._trees.pop(tree, None)

    def cache_lost(self) -> None:
        """The engine's cache is empty: nothing has been forwarded."""
        for turns in self._trees.values():
            for turn in turns.values():
                turn.entered = 0

    def _check(self, request: Request, news: dict[TurnKey, _Turn]) -> int:
        """Tokens known to have been forwarded; what the request tells of its turns goes into `news`."""
        prompt = np.asarray(request.prompt_ids, dtype=np.int64)
        ends = [node.end for node in request.path]
        if not len(prompt) or not ends or ends[-1] != len(prompt) or sorted(ends) != ends:
            raise ValueError(f"turn {request.turn_key}: path ends {ends} do not fit its {len(prompt)} prompt tokens")
        entered = 0
        for node, start in zip(request.path, [0, *ends], strict=False):
            tokens = prompt[start : node.end]
            turn = news.get(node.key) or self._find(node.key)
            if turn is None:
                turn = news[node.key] = _Turn(start, tokens, observed=True, entered=0)
            _compare(node.key, turn, start, tokens)
            if not turn.observed:
                news[node.key] = _Turn(start, tokens, observed=True, entered=turn.entered)
            entered = max(entered, turn.entered)
        return entered

    def _find(self, key: TurnKey) -> _Turn | None:
        return self._trees[key[0]].get(key[1]) if key[0] in self._trees else None


def _compare(key: TurnKey, turn: _Turn, start: int, tokens: Ints) -> None:
    """Raise ValueError unless `tokens` are those of `turn`, with an observation added where it has none yet."""
    if start != turn.start:
        raise ValueError(f"turn {key} began at token {turn.start} of its path and is now said to begin at {start}")
    shared = min(len(tokens), len(turn.ids))
    different = np.flatnonzero(tokens[:shared] != turn.ids[:shared])
    if len(different):
        first = int(different[0])
        raise ValueError(
            f"turn {key} is not continued as it was: token {start + first} of the path is {tokens[first]}, but was "
            f"{turn.ids[first]} (token {first} of the turn); sampled tokens must never be decoded and encoded again"
        )
    if len(tokens) < len(turn.ids) or (turn.observed and len(tokens) > len(turn.ids)):
        raise ValueError(
            f"turn {key} is not continued as it was: it had {len(turn.ids)} tokens and is now given with {len(tokens)}"
        )
