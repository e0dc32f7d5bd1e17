"""The training loop between rollout and sync: what an update reads, packs and steps on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from atpo_fast import Objective, assign_credit
from atpo_fast.config import Config, ModelConfig, TrainConfig
from atpo_fast.packing import PackedTrees
from atpo_fast.telemetry import PhaseTimer
from atpo_fast.train import loop
from atpo_fast.train.checkpoints import TrainState
from atpo_fast.train.loop import Trainer
from atpo_fast.tree import Forest, as_forest
from tests.helpers.strategies import special_forest


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[PackedTrees]]:
    """Rows of the optimizer steps that were taken; nothing else happens in them."""
    taken: list[list[PackedTrees]] = []
    monkeypatch.setattr(loop, "set_learning_rate", lambda zero, lr: None)
    monkeypatch.setattr(loop, "optimizer_step", lambda zero, watch, rows, *_: taken.append(rows))
    return taken


@pytest.fixture
def trainer() -> Trainer:
    """A trainer of mini-batches of two questions, without model and engine."""
    made: Any = Trainer.__new__(Trainer)
    train = TrainConfig(questions_per_step=4, questions_per_minibatch=2, row_tokens=64, old_logprobs="rollout")
    made.config = Config(model=ModelConfig(dtype="float32"), train=train)
    made.run = SimpleNamespace(timer=PhaseTimer(), progress=Mock(), world=1, rank=0)
    made.objective, made.max_prefix, made.reference = Objective.preset("at2po"), 0, None
    made.zero = made.watch = None
    made.state = TrainState()
    return made


def test_trees_are_read_once_a_step(
    trainer: Trainer, steps: list[list[PackedTrees]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the trees are read again for the packing of a mini-batch, or a mini-batch has another's trees."""
    trees, read = special_forest(), []
    build = Forest.__post_init__
    monkeypatch.setattr(Forest, "__post_init__", lambda forest: read.append(forest) or build(forest))
    forest = as_forest(trees)
    assign_credit(forest)
    _, pruned = trainer._update(forest, staleness=0)
    assert read == [forest]
    assert len(steps) == trainer.state.optimizer_steps == 2  # the third has a tree without a leaf: no gradient
    for first, rows in zip((0, 2), steps, strict=True):
        assert {int(t) for row in rows for t in row.turn_tree} <= {0, 1}
        kept = sum(row.unique_tokens for row in rows)
        assert 0 < kept <= sum(tree.unique_tokens for tree in trees[first : first + 2])
    whole = sum(tree.unique_tokens for tree in trees)
    assert pruned == whole - sum(row.unique_tokens for rows in steps for row in rows)
