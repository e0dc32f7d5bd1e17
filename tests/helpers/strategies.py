"""Random search trees: for Hypothesis, and fixed ones that hold every special shape."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from atpo_fast import TurnTree, assign_credit

VOCAB = 7


@st.composite
def trees(draw: st.DrawFn, max_turns: int = 9, credit: bool = True) -> TurnTree:
    """A tree of 1 to `max_turns` turns: actions of 0-3 tokens, observations of 0-2, multiplicities, equal rewards."""
    size = draw(st.integers(1, max_turns))
    parents = [draw(st.integers(0, n)) for n in range(size)]
    lengths = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=size, max_size=size))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    tree = TurnTree(rng.integers(0, VOCAB, draw(st.integers(1, 3))), question_id="q")
    for parent, (action, observation) in zip(parents, lengths, strict=True):
        tree.add_turn(parent, rng.integers(0, VOCAB, action), -rng.random(action), rng.integers(0, VOCAB, observation))
    for leaf in tree.leaves:
        tree.set_reward(leaf, draw(st.sampled_from([-1.0, 0.0, 1.0])))
        tree.set_multiplicity(leaf, draw(st.sampled_from([1, 1, 1, 3])))
    if credit:
        assign_credit([tree], draw(st.sampled_from(["at2po", "grpo"])))
    return tree


def forests(max_trees: int = 3, max_turns: int = 9) -> st.SearchStrategy[list[TurnTree]]:
    """One to `max_trees` trees with credit."""
    return st.lists(trees(max_turns), min_size=1, max_size=max_trees)


def special_forest() -> list[TurnTree]:
    """Trees without credit: a bush with duplicated leaves, single-token turns and empty observations; one leaf; a chain
    of 12 turns with side branches; a tree of equal rewards (zero advantages); a tree whose every leaf failed."""
    rng = np.random.default_rng(0)
    return [_bush(rng), _one_leaf(rng), _deep_chain(rng), _equal_rewards(rng), TurnTree([1, 2], question_id="failed")]


def _bush(rng: np.random.Generator) -> TurnTree:
    tree = TurnTree(rng.integers(0, VOCAB, 4), question_id="bush")
    inner = [_turn(tree, rng, 0, 3, 2), _turn(tree, rng, 0, 1, 0), _turn(tree, rng, 0, 2, 1)]
    inner += [_turn(tree, rng, inner[0], 1, 3), _turn(tree, rng, inner[1], 1, 0)]
    for parent in (inner[0], inner[3], inner[3], inner[4], inner[4], inner[2]):
        leaf = _turn(tree, rng, parent, int(rng.integers(1, 4)), 0)
        tree.set_reward(leaf, float(rng.integers(-1, 2)))
    tree.set_multiplicity(tree.leaves[-1], 3)
    tree.set_multiplicity(tree.leaves[1], 2)
    return tree


def _one_leaf(rng: np.random.Generator) -> TurnTree:
    tree = TurnTree(rng.integers(0, VOCAB, 2), question_id="one leaf")
    tree.set_reward(_turn(tree, rng, _turn(tree, rng, 0, 2, 1), 2, 0), 1.0)
    return tree


def _deep_chain(rng: np.random.Generator) -> TurnTree:
    tree = TurnTree(rng.integers(0, VOCAB, 1), question_id="chain")
    turn = 0
    for step in range(12):
        turn = _turn(tree, rng, turn, 1 + step % 2, step % 3)
        if step % 4 == 2:
            tree.set_reward(_turn(tree, rng, turn, 2, 0), float(step % 3))
    tree.set_reward(_turn(tree, rng, turn, 1, 0), 1.0)
    return tree


def _equal_rewards(rng: np.random.Generator) -> TurnTree:
    tree = TurnTree(rng.integers(0, VOCAB, 3), question_id="equal")
    inner = _turn(tree, rng, 0, 2, 2)
    for parent in (0, inner, inner):
        tree.set_reward(_turn(tree, rng, parent, 2, 0), 0.1)
    return tree


def _turn(tree: TurnTree, rng: np.random.Generator, parent: int, action: int, observation: int) -> int:
    ids = rng.integers(0, VOCAB, action + observation)
    return tree.add_turn(parent, ids[:action], -rng.random(action), ids[action:])
