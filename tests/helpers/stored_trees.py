"""A tree with every optional field, and its comparison with one that was read again."""

from __future__ import annotations

import math

import numpy as np

from atpo_fast.tree.turn_tree import CLIP_RANGES, SCORES, TurnTree


class Letters:
    """A tokenizer of characters: token id = code point."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(chr, token_ids))


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def make_tree() -> TurnTree:
    """Root, a search with two answers under it, and a leaf that failed: every optional field used and unused."""
    tree = TurnTree(encode("Who?"), question_id="q1", meta={"question": "Who?", "answers": ["é", "\ud800"]})
    search = tree.add_turn(0, encode("<search>x</search>"), np.linspace(-1, 0, 18), encode("<r>é</r>"), tool="search")
    good = tree.add_turn(search, encode("yes"), [-0.1, -1 / 3, -1e-300], finish_reason="eos")
    bad = tree.add_turn(search, encode("n"), [-math.inf], [], finish_reason="length")
    tree.add_turn(0, [], [], finish_reason="error")
    tree.set_reward(good, 1)
    tree.set_reward(bad, -1)
    tree.set_multiplicity(bad, 3)
    return tree


def assert_equal(one: TurnTree, other: TurnTree) -> None:
    assert (one.question_id, one.meta, len(one)) == (other.question_id, other.meta, len(other))
    for a, b in zip(one.turns, other.turns, strict=True):
        for name in ("action_ids", "logprobs", "observation_ids"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        for name in ("parent", "finish_reason", "tool", "children", "reward", "multiplicity"):
            assert getattr(a, name) == getattr(b, name), name
    for name in (*SCORES, *CLIP_RANGES):
        x, y = getattr(one, name), getattr(other, name)
        assert (x is None) == (y is None)
        if x is not None:
            np.testing.assert_array_equal(x, y)
