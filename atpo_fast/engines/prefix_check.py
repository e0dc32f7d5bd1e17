"""Check that every turn is continued with the very tokens that the engine wrote and was shown before.

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

from atpo_fast.engines.request import Request, TurnKey

Ints = NDArray[np.int64]


@dataclass(slots=True)
class _Turn:
    """Tokens of a turn: those that were sampled, and its observation once a request has brought it."""

    parent: TurnKey | None  # turn above; None for a root
    start: int  # index in the path of the turn's first token
    ids: Ints
    observed: bool  # whether `ids` includes the observation
    forwarded: int  # number of tokens of the path, this turn included, that the engine has forwarded


class PrefixCheck:
    """A record of the turns of unreleased trees, with which the prompts of new requests are compared."""

    def __init__(self) -> None:
        self._trees: dict[Hashable, dict[int, _Turn]] = defaultdict(dict)
        self._asked: set[TurnKey] = set()  # turns being written

    def admit(self, requests: Sequence[Request]) -> list[int]:
        """Check the prompts of requests and remember the observations in them, of all requests or of none.

        Return how many tokens of each prompt are known to have been forwarded.

        Raises:
            ValueError: a path contradicts its prompt, a turn exists already, or a prompt is not what the engine wrote
                and was shown before; the message names the first differing token.
        """
        news: dict[TurnKey, _Turn] = {}
        asked: set[TurnKey] = set()
        forwarded = []
        for request in requests:
            key = request.turn_key
            if key in asked or key in self._asked or self._find(key) is not None:
                raise ValueError(f"turn {key} has been requested already; every turn needs its own key")
            asked.add(key)
            forwarded.append(self._check(request, news))
        for key, turn in news.items():
            self._trees[key[0]][key[1]] = turn
        self._asked |= asked
        return forwarded

    def written(self, request: Request, token_ids: Sequence[int]) -> None:
        """Remember a completion, whose last token has not been forwarded."""
        start = len(request.prompt_ids)
        parent = self._find(request.path[-1].key)
        assert parent is not None
        parent.forwarded = start
        self._asked.discard(request.turn_key)
        tree, number = request.turn_key
        ids = np.asarray(token_ids, dtype=np.int64)
        self._trees[tree][number] = _Turn(
            request.path[-1].key, start, ids, observed=False, forwarded=start + len(ids) - 1
        )

    def dropped(self, request: Request) -> None:
        """Forget that a turn was asked for."""
        self._asked.discard(request.turn_key)

    def release(self, tree: Hashable) -> None:
        """Forget a tree, none of whose turns is being written."""
        self._trees.pop(tree, None)

    def clear(self) -> None:
        """Forget everything, for an engine that has lost its cache."""
        self._trees.clear()
        self._asked.clear()

    def _check(self, request: Request, news: dict[TurnKey, _Turn]) -> int:
        """Count the tokens known to have been forwarded, and add what is new about its turns to `news`."""
        prompt = np.asarray(request.prompt_ids, dtype=np.int64)
        ends = [node.end for node in request.path]
        if not len(prompt) or not ends or ends[-1] != len(prompt) or sorted(ends) != ends:
            raise ValueError(f"turn {request.turn_key}: path ends {ends} do not fit its {len(prompt)} prompt tokens")
        forwarded = 0
        parent = None
        for node, start in zip(request.path, [0, *ends], strict=False):
            tokens = prompt[start : node.end]
            turn = news.get(node.key) or self._find(node.key)
            if turn is None:
                turn = news[node.key] = _Turn(parent, start, tokens, observed=True, forwarded=0)
            _compare(node.key, turn, parent, start, tokens)
            if not turn.observed:
                news[node.key] = _Turn(parent, start, tokens, observed=True, forwarded=turn.forwarded)
            forwarded = max(forwarded, turn.forwarded)
            parent = node.key
        return forwarded

    def _find(self, key: TurnKey) -> _Turn | None:
        return self._trees[key[0]].get(key[1]) if key[0] in self._trees else None


def _compare(key: TurnKey, turn: _Turn, parent: TurnKey | None, start: int, tokens: Ints) -> None:
    """Raise ValueError unless `tokens` are those of `turn`, with an observation added where it has none yet."""
    if start != turn.start:
        raise ValueError(f"turn {key} began at token {turn.start} of its path and is now said to begin at {start}")
    if parent != turn.parent:
        raise ValueError(f"turn {key} has continued turn {turn.parent} and is now said to continue turn {parent}")
    shared = min(len(tokens), len(turn.ids))
    different = np.flatnonzero(tokens[:shared] != turn.ids[:shared])
    if len(different):
        first = int(different[0])
        raise ValueError(
            f"turn {key} is not continued as it was: token {start + first} of the path is {tokens[first]}, but was "
            f"{turn.ids[first]} (token {first} of the turn); sampled tokens must never be decoded and encoded again, "
            "and the name of a finished tree is free only after its release"
        )
    if len(tokens) < len(turn.ids) or (turn.observed and len(tokens) > len(turn.ids)):
        raise ValueError(
            f"turn {key} is not continued as it was: it had {len(turn.ids)} tokens and is now given with {len(tokens)}"
        )
