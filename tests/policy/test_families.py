"""Every family of models on packed trees equals transformers on flat trajectories, in float64, and makes the table."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.common.choices import GradientCheckpointing
from atpo_fast.packing import depth_first
from atpo_fast.policy import Policy
from atpo_fast.policy.opened_rows.run import accumulate_gradients
from tests.helpers.families import FAMILIES, VOCAB, WINDOW, full_float64, make
from tests.helpers.flat_reference import flat_loss, flatten

OBJECTIVE = Objective.preset("at2po", clip_low=5.0, clip_high=5.0, entropy_coef=0.01)
EXACT = 1e-9  # of the largest gradient; float64 leaves about 1e-14


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(depth_first, "ROW_TOKENS", 0)  # or trees as small as these would rather repeat their ancestors
    with full_float64():
        yield


def forest() -> list[TurnTree]:
    """Two trees whose paths are several windows long, with siblings of unequal lengths."""
    rng = np.random.default_rng(3)
    out = []
    for t, prompt in enumerate((7, 15)):
        tree = TurnTree(rng.integers(0, VOCAB, prompt), question_id=str(t))
        a = tree.add_turn(0, rng.integers(0, VOCAB, 5), observation_ids=rng.integers(0, VOCAB, 6))
        b = tree.add_turn(a, rng.integers(0, VOCAB, 1), observation_ids=rng.integers(0, VOCAB, 4))
        leaves = [
            tree.add_turn(b, rng.integers(0, VOCAB, 9)),
            tree.add_turn(b, rng.integers(0, VOCAB, 2)),
            tree.add_turn(a, rng.integers(0, VOCAB, 4)),
            tree.add_turn(0, rng.integers(0, VOCAB, 3)),
        ]
        for leaf, reward in zip(leaves, (1.0, 0.0, 0.5, 0.0), strict=True):
            tree.set_reward(leaf, reward)
        out.append(tree)
    assign_credit(out)
    return out


@cache
def flat(name: str) -> dict[str, Tensor]:
    """Loss and gradients of the flat trajectories through transformers' own model, one at a time."""
    model = make(name)

    def logits(ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        return model(input_ids=ids[None], use_cache=False).logits[0]

    loss = flat_loss(logits, flatten(forest()), OBJECTIVE)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_flat(name: str, policy: Policy, loss: Tensor) -> None:
    expected = flat(name)
    found = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for parameter, value in expected.items():
        torch.testing.assert_close(found[parameter], value, rtol=0, atol=EXACT * largest)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_packed_tree_equals_its_flat_trajectories(name: str) -> None:
    """Fails if a family's layers get another window, cap, sink or scale than transformers gives them, if its windows
    count siblings, or its logits are made in another way."""
    (row,) = pack_trees(forest(), OBJECTIVE, 4096, dtype=torch.float64)
    policy = Policy(make(name))
    loss = policy(row, OBJECTIVE).loss
    loss.backward()
    assert_flat(name, policy, loss)


@pytest.mark.parametrize(
    ("name", "choice"), [(name, choice) for name, family in FAMILIES.items() for choice in family.checkpointing]
)
def test_rows_with_prefixes_and_checkpointing(name: str, choice: GradientCheckpointing) -> None:
    """Fails if a window does not reach into the rows above or reaches too far, if a gradient of keys that layers share
    is lost, or if what is computed again leaves out a token that a window needs."""
    rows = pack_trees(forest(), OBJECTIVE, 17, dtype=torch.float64, max_prefix=500)
    assert max(row.prefix_tokens for row in rows) > 2 * WINDOW
    policy = Policy(make(name), gradient_checkpointing=choice).train()
    loss = accumulate_gradients(policy, rows, OBJECTIVE)
    assert_flat(name, policy, loss)


def test_shared_keys_are_not_computed_again() -> None:
    """Fails if layers whose keys come from another layer are checkpointed: their gradients would be lost in silence."""
    with pytest.raises(ValueError, match=r"last 2 layers read keys.*gradient_checkpointing=mlp"):
        Policy(make("gemma4-small"), gradient_checkpointing="layer")
