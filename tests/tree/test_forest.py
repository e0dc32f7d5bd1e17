"""The flat table of turns: what is derived from the trees, and the parts that are cut out of it."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.tree import Forest, as_forest
from tests.helpers.strategies import forests, special_forest


def below(tree: TurnTree, turn: int) -> list[int]:
    """The turns of a turn's subtree, itself included."""
    return [n for n in range(len(tree)) if turn in tree.path(n)]


@settings(max_examples=50, deadline=None)
@given(trees=forests())
def test_sums_over_turns(trees: list[TurnTree]) -> None:
    """Fails if a sum runs over the turns of another tree, misses the turn itself, or counts leaves not below it."""
    forest = as_forest(trees)
    turns = [(t, n) for t, tree in enumerate(trees) for n in range(len(tree))]
    assert list(zip(forest.tree.tolist(), forest.index.tolist(), strict=True)) == turns
    assert forest.tree_offsets.tolist() == [turns.index((t, 0)) for t in range(len(trees))] + [len(turns)]
    leaves = [turns[n] for n in forest.leaves]
    assert leaves == [(t, n) for t, tree in enumerate(trees) for n in tree.leaves]
    values = np.arange(1.0, len(turns) + 1, dtype=np.float64)
    of_leaf = np.arange(1.0, len(leaves) + 1, dtype=np.float64)
    value, leaf_value = dict(zip(turns, values, strict=True)), dict(zip(leaves, of_leaf, strict=True))
    for at, (t, n) in enumerate(turns):
        tree = trees[t]
        assert forest.sum_up(values)[at] == sum(value[t, m] for m in below(tree, n))
        assert forest.sum_children(values)[at] == sum(value[t, m] for m in tree.turns[n].children)
        assert forest.sum_leaves_below(of_leaf)[at] == sum(leaf_value.get((t, m), 0.0) for m in below(tree, n))
        assert forest.nll[at] == tree.turns[n].nll


@settings(max_examples=50, deadline=None)
@given(data=st.data(), trees=forests(max_trees=5))
def test_a_part_is_the_table_of_its_trees(data: st.DataObject, trees: list[TurnTree]) -> None:
    """Fails if an index of a part still counts from the whole forest, or a part is one turn, leaf or path off."""
    first = data.draw(st.integers(0, len(trees) - 1))
    last = data.draw(st.integers(first, len(trees)))
    part, alone = as_forest(trees).part(first, last), as_forest(trees[first:last])
    assert part.trees == alone.trees
    assert len(part.names) == len(alone.names)  # which number the trees as in the whole list
    for field in fields(Forest):
        if field.name not in ("names", "trees"):
            mine, expected = getattr(part, field.name), getattr(alone, field.name)
            assert len(mine) == len(expected), field.name
            assert all(np.array_equal(a, b) for a, b in zip(mine, expected, strict=True)), field.name


def test_parts_of_parts() -> None:
    """Fails if a part cannot be cut further."""
    trees = special_forest()
    part, alone = as_forest(trees).part(1, 5).part(1, 3), as_forest(trees[2:4])
    assert part.path_turns.tolist() == alone.path_turns.tolist()
    assert part.order.tolist() == alone.order.tolist()


def test_no_trees() -> None:
    """Fails if a step in which every question failed to start ends in an error."""
    forest = as_forest([])
    assign_credit(forest)
    assert pack_trees(forest, Objective.preset("at2po"), 64) == []
    assert pack_trees(as_forest(special_forest()).part(2, 2), Objective.preset("at2po"), 64) == []


def test_credit_and_packing_use_the_table_that_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if trees are read again for credit, or for the packing of any mini-batch."""
    trees, read = special_forest(), []
    build = Forest.__post_init__
    monkeypatch.setattr(Forest, "__post_init__", lambda forest: read.append(forest) or build(forest))
    forest = as_forest(trees)
    assert as_forest(forest) is forest
    assign_credit(forest)
    objective = Objective.preset("at2po")
    rows = [pack_trees(forest.part(first, first + 2), objective, 64) for first in range(0, len(trees), 2)]
    assert read == [forest]
    for first, mine in zip(range(0, len(trees), 2), rows, strict=True):
        for row, expected in zip(mine, pack_trees(trees[first : first + 2], objective, 64), strict=True):
            for field in fields(expected):
                assert np.array_equal(getattr(row, field.name), getattr(expected, field.name)), field.name
