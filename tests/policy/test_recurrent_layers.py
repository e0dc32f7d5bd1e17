"""Layers with a state on packed trees: the loss and every gradient are those of the flat trajectories.

See docs/design.md#recurrent-layers. Flat trajectories go through the unchanged Hugging Face model.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoHybridConfig, PreTrainedModel

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.common.choices import GradientCheckpointing
from atpo_fast.packing import depth_first
from atpo_fast.policy import Policy, accumulate_gradients
from atpo_fast.policy.attention import check_supported
from atpo_fast.recurrent.layers import carry_states
from tests.helpers.flat_reference import flat_loss, flatten
from tests.helpers.hybrid_models import HYBRIDS, VOCAB, in_float64, make_hybrid

TURN = Objective.preset("at2po", clip_low=0.3, clip_high=0.3)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with in_float64():
        yield


def forest() -> list[TurnTree]:
    """Two trees of three levels: turns of 1 to 40 tokens, an only child, a turn without tokens."""
    rng = np.random.default_rng(0)
    trees = []
    for t in range(2):
        tree = TurnTree(rng.integers(0, VOCAB, 9 - 7 * t), question_id=str(t))

        def add(parent: int, actions: int, observations: int, tree: TurnTree = tree) -> int:
            action = rng.integers(0, VOCAB, actions)
            return tree.add_turn(parent, action, -rng.random(actions), rng.integers(0, VOCAB, observations))

        first, second = add(0, 5, 4), add(0, 1, 1)
        only = add(first, 2, 40)
        for parent in (only, only, add(second, 0, 0), second, first):
            add(parent, int(rng.integers(1, 7)), 0)
        for leaf in tree.leaves:
            tree.set_reward(leaf, float(rng.integers(0, 2)))
        trees.append(tree)
    trees[0].set_reward(trees[0].leaves[0], 3.0)
    assign_credit(trees)
    return trees


@cache
def flat_gradients(name: str) -> dict[str, Tensor]:
    """Loss and gradients of the flat trajectories through the plain model, by parameter."""
    model = make_hybrid(name)

    def logits(ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        return model(ids[None], use_cache=False).logits[0]

    loss = flat_loss(logits, flatten(forest()), TURN)
    loss.backward()
    return found(model, loss.detach())


def found(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return gradients | {"loss": loss}


def assert_same(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal within 1e-9 of the largest entry of each."""
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=1e-9 * scale, msg=name)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_packed_tree_is_its_flat_trajectories(name: str) -> None:
    """Fails if a turn starts from another state than that before it on its path, or padding enters one."""
    policy = Policy(make_hybrid(name)).train()
    rows = pack_trees(forest(), TURN, 4096, dtype=torch.float64)
    loss = accumulate_gradients(policy, rows, TURN)
    assert_same(found(policy.model, loss), flat_gradients(name))


@pytest.mark.parametrize("name", HYBRIDS)
def test_rows_with_prefixes_carry_states(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if state or last inputs of a row above, or their gradients, are lost, doubled or of another layer.

    Layers that are computed again have other trees in test_families.py too, in every family.
    """
    choice: GradientCheckpointing = "layer" if HYBRIDS.index(name) % 2 else "none"
    monkeypatch.setattr(depth_first, "ROW_TOKENS", 0)  # otherwise trees as small as these would repeat their ancestors
    policy = Policy(make_hybrid(name), gradient_checkpointing=choice).train()
    rows = pack_trees(forest(), TURN, 47, dtype=torch.float64, max_prefix=500)
    assert max(row.depth for row in rows) >= 2
    loss = accumulate_gradients(policy, rows, TURN)
    assert_same(found(policy.model, loss), flat_gradients(name))


@pytest.mark.parametrize("name", HYBRIDS)
def test_tokens_without_gradient_are_left_out_of_the_backward(name: str) -> None:
    """Fails if the row of the needed tokens has other segments than the tree that they are of."""
    gradients = []
    for choice in ("none", "layer"):
        policy = Policy(make_hybrid(name), gradient_checkpointing=choice).train()
        (row,) = pack_trees(forest(), TURN, 4096, dtype=torch.float64)
        turn = torch.arange(row.num_turns).repeat_interleave(row.turn_offsets.diff())
        logprob, _ = policy(row)
        (logprob * (turn % 3 == 1)).sum().backward()
        gradients.append(found(policy.model, logprob.sum().detach()))
    assert policy.skipped_tokens > row.num_tokens / 4
    assert_same(gradients[1], gradients[0])


def test_unknown_layers_with_a_state_are_refused() -> None:
    """Fails if a model type passes whose layers were never compared with flat trajectories."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(OlmoHybridConfig(num_hidden_layers=4))
    with pytest.raises(ValueError, match=r"olmo_hybrid: layers 0-2 of type linear_attention: not supported on trees"):
        check_supported(model)
    check_supported(make_hybrid("nemotron_h"))


def test_another_version_of_the_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a layer whose code does not call the known functions runs over a row as if it were one path."""
    model = make_hybrid("qwen3_5")
    layer = type(model.model.layers[0].linear_attn)
    monkeypatch.setattr(layer, "forward", lambda self, hidden_states, **_: hidden_states)
    with pytest.raises(ValueError, match=r"layers \[0, 2\] have a state, but only \[\] call causal_conv1d_fn"):
        carry_states(model)
