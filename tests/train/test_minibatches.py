"""Mini-batches of a step: which trees they hold, and that the forest is read once for all of them."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from atpo_fast import Objective, assign_credit, pack_trees
from atpo_fast.packing import spread_rows
from atpo_fast.policy.opened_rows.plan import plan_passes
from atpo_fast.train.minibatches import pack_minibatches, trees_per_minibatch
from atpo_fast.tree import Forest, as_forest
from tests.helpers.strategies import special_forest

OBJECTIVE = Objective.preset("at2po")


def test_trees_are_read_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the trees are read again for credit or for the packing of a mini-batch."""
    read: list[Forest] = []
    build = Forest.__post_init__
    monkeypatch.setattr(Forest, "__post_init__", lambda forest: read.append(forest) or build(forest))
    forest = as_forest(special_forest())
    assign_credit(forest)
    assert len(pack_minibatches(forest, OBJECTIVE, [2, 2, 1], row_tokens=64)) == 3
    assert read == [forest]


@pytest.mark.parametrize("world", [1, 2])
def test_minibatches_are_those_of_their_trees(world: int) -> None:
    """Fails if a mini-batch has another's trees, ranks disagree, or pruned tokens are counted for one rank only."""
    trees = special_forest()
    forest = as_forest(trees)
    assign_credit(forest)
    for rank in range(world):
        batches = pack_minibatches(forest, OBJECTIVE, [2, 2, 1], row_tokens=30, rank=rank, world=world)
        for first, batch in zip((0, 2, 4), batches, strict=True):
            mine = trees[first : first + 2]
            rows = pack_trees(mine, OBJECTIVE, 30)
            assert batch.pruned == sum(tree.unique_tokens for tree in mine) - sum(row.unique_tokens for row in rows)
            spread = spread_rows(rows, world) if rows else [[]] * world
            assert batch.passes == plan_passes(spread)[rank]
            for row, expected in zip(batch.rows, spread[rank], strict=True):
                for field in fields(expected):
                    assert np.array_equal(getattr(row, field.name), getattr(expected, field.name)), field.name
    assert [len(batch.rows) > 0 for batch in batches] == [True, True, False]  # the last one's only tree has no leaf


def test_minibatches_hold_whole_questions() -> None:
    """Fails if trees are counted for questions, so that a question's trees come into different mini-batches."""
    assert trees_per_minibatch([2, 2, 3, 1, 2], 2) == [4, 4, 2]
    assert trees_per_minibatch([], 2) == []
    with pytest.raises(ValueError, match=r"4 trees .* of 5"):
        pack_minibatches(as_forest(special_forest()), OBJECTIVE, [2, 2], row_tokens=64)
