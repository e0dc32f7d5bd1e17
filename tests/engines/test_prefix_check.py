"""What an engine remembers of unfinished trees: a prompt that is not what was generated is an error that says where."""

from __future__ import annotations

import pytest

from atpo_fast.engines.base import PathNode, Request, SamplingParams
from atpo_fast.engines.prefix_check import PrefixCheck


def ask(turn: int, *parts: list[int], path: tuple[int, ...] = (), tree: str = "t") -> Request:
    """A request for `turn`; the prompt is made of `parts`, those of the turns in `path` (default: 0, 1, ...)."""
    ids = [token for part in parts for token in part]
    ends = [sum(map(len, parts[: i + 1])) for i in range(len(parts))]
    names = path or tuple(range(len(parts)))
    nodes = tuple(PathNode(key=(tree, name), end=end) for name, end in zip(names, ends, strict=True))
    return Request(prompt_ids=ids, sampling=SamplingParams(max_new_tokens=5), seed=0, path=nodes, turn_key=(tree, turn))


def written(turns: PrefixCheck, request: Request, ids: list[int]) -> None:
    turns.admit([request])
    turns.written(request, ids)


def test_continuation_that_differs_names_the_first_token() -> None:
    # Fails if sampled tokens, observations or the prompt are not compared, or another position is named.
    turns = PrefixCheck()
    written(turns, ask(1, [5, 6, 7]), [10, 11, 12])
    turns.admit([ask(2, [5, 6, 7], [10, 11, 12, 20, 21])])
    with pytest.raises(ValueError, match=r"turn \('t', 1\).*token 4 of the path is 99, but was 11 \(token 1"):
        turns.admit([ask(3, [5, 6, 7], [10, 99, 12, 20, 21])])
    with pytest.raises(ValueError, match="token 7 of the path is 22, but was 21"):
        turns.admit([ask(3, [5, 6, 7], [10, 11, 12, 20, 22])])
    with pytest.raises(ValueError, match=r"turn \('t', 0\).*token 0 of the path is 4"):
        turns.admit([ask(3, [4, 6, 7])])
    with pytest.raises(ValueError, match="had 5 tokens and is now given with 4"):
        turns.admit([ask(3, [5, 6, 7], [10, 11, 12, 20])])
    with pytest.raises(ValueError, match="had 5 tokens and is now given with 6"):
        turns.admit([ask(3, [5, 6, 7], [10, 11, 12, 20, 21, 22])])
    with pytest.raises(ValueError, match="began at token 3 of its path and is now said to begin at 0"):
        turns.admit([ask(3, [10, 11, 12, 20, 21], path=(1,))])
    turns.admit([ask(3, [5, 6, 7], [10, 11, 12, 20, 21])])


def test_known_tokens_are_those_that_were_forwarded() -> None:
    # The last token of a completion is forwarded only when the turn is continued.
    turns = PrefixCheck()
    first = ask(1, [5, 6, 7])
    assert turns.admit([first]) == [0]
    turns.written(first, [10, 11, 12])
    assert turns.admit([ask(2, [5, 6, 7])]) == [3]
    child = ask(3, [5, 6, 7], [10, 11, 12, 20, 21])
    assert turns.admit([child]) == [5]
    turns.written(child, [30])
    assert turns.admit([ask(4, [5, 6, 7], [10, 11, 12, 20, 21])]) == [8]
    turns.clear()
    assert turns.admit([ask(5, [5, 6, 7], [10, 11, 12, 20, 21])]) == [0]


def test_all_requests_of_a_call_or_none() -> None:
    # Fails if a refused call leaves an observation or a name behind.
    turns = PrefixCheck()
    written(turns, ask(1, [5]), [10])
    with pytest.raises(ValueError, match="requested already"):
        turns.admit([ask(2, [5], [10, 77]), ask(1, [5])])
    with pytest.raises(ValueError, match="but was 77"):
        turns.admit([ask(2, [5], [10, 77]), ask(3, [5], [10, 78])])
    turns.admit([ask(2, [5], [10, 79])])
    with pytest.raises(ValueError, match="requested already"):  # it is being written
        turns.admit([ask(2, [5], [10, 79])])
    with pytest.raises(ValueError, match="do not fit its 2 prompt tokens"):
        turns.admit([Request(**{**as_arguments(ask(4, [5])), "prompt_ids": [5, 6]})])


def as_arguments(request: Request) -> dict:
    return {name: getattr(request, name) for name in ("prompt_ids", "sampling", "seed", "path", "turn_key")}


def test_dropped_turns_and_released_trees_are_forgotten() -> None:
    turns = PrefixCheck()
    request = ask(1, [5])
    turns.admit([request])
    turns.dropped(request)
    written(turns, request, [10])
    other = ask(1, [5], tree="u")
    written(turns, other, [11])
    turns.release("t")
    written(turns, ask(1, [6]), [12])  # the name again, with another prompt
    with pytest.raises(ValueError, match="requested already"):
        turns.admit([other])
