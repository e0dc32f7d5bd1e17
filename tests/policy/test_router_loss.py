"""Auxiliary losses of mixtures of experts: on packed trees, on rows below others, and computed again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from atpo_fast import pack_trees
from atpo_fast.common.choices import GradientCheckpointing
from atpo_fast.packing import depth_first
from atpo_fast.policy import Policy, accumulate_gradients
from atpo_fast.tree.packed_rows import PackedTrees
from tests.helpers.families import FAMILIES, make
from tests.helpers.family_table import OBJECTIVE, Gradients, collect, difference, forest
from tests.helpers.hybrid_models import in_float64

BALANCE, Z = 0.3, 0.02
WITH_LOSSES = ["qwen3-moe", "gpt-oss", "qwen3_next", "granitemoehybrid"]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(depth_first, "ROW_TOKENS", 0)  # or trees as small as these would rather repeat their ancestors
    with in_float64():
        yield


def gradients(
    name: str, rows: list[PackedTrees], choice: GradientCheckpointing = "none", weights: tuple[float, float] = (0, 0)
) -> tuple[Gradients, Policy]:
    policy = Policy(make(name), gradient_checkpointing=choice, router_balance=weights[0], router_z=weights[1]).train()
    loss = accumulate_gradients(policy, rows, OBJECTIVE)
    return collect(policy.model, loss), policy


def routed(model: PreTrainedModel) -> list[Tensor]:
    """The (n, E) logits of every router over all unique tokens, through transformers' own model path by path."""
    by_path: list[list[Tensor]] = []
    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]

    def note(module: nn.Module, inputs: object, out: tuple[Tensor, ...]) -> None:
        floats = [x for x in out if x.is_floating_point()]
        by_path[-1].append(max(floats, key=lambda x: x.shape[-1]))

    hooks = [router.register_forward_hook(note) for router in routers]
    kept: list[Tensor] = []
    for tree in forest():
        known: set[int] = set()
        for leaf in tree.leaves:
            by_path.append([])
            model(input_ids=torch.from_numpy(tree.path_ids(leaf))[None], use_cache=False)
            fresh = []
            for number in tree.path(leaf):
                turn = tree.turns[number]
                fresh += [number not in known] * (len(turn.action_ids) + len(turn.observation_ids))
                known.add(number)
            kept.append(torch.tensor(fresh))
    for hook in hooks:
        hook.remove()
    return [
        torch.cat([logits[layer][mask] for logits, mask in zip(by_path, kept, strict=True)])
        for layer in range(len(routers))
    ]


@pytest.mark.parametrize("name", WITH_LOSSES)
def test_each_unique_token_counts_once(name: str) -> None:
    """Fails if the losses are those of other tokens, of another formula than transformers' in each layer, or if their
    gradient is scaled otherwise than the policy's."""
    (row,) = pack_trees(forest(), OBJECTIVE, 4096, dtype=torch.float64)
    without, _ = gradients(name, [row])
    found, policy = gradients(name, [row], weights=(BALANCE, Z))
    model = make(name)
    losses = []
    for logits in routed(model):
        balance = load_balancing_loss_func((logits,), logits.shape[1], model.config.num_experts_per_tok)
        losses.append(BALANCE * balance + Z * logits.logsumexp(-1).square().mean())
    expected = torch.stack(losses).mean()
    expected.backward()
    assert policy.router_loss is not None
    torch.testing.assert_close(policy.router_loss.total, expected.detach().double(), rtol=1e-12, atol=0)
    for parameter, value in collect(model, expected).items():
        if parameter != "loss":
            size = max(float(found[parameter].abs().max()), 1e-3)
            torch.testing.assert_close(found[parameter] - without[parameter], value, rtol=0, atol=1e-10 * size)


@pytest.mark.parametrize("name", ["qwen3-moe", "granitemoehybrid"])
def test_rows_below_others_and_layers_computed_again(name: str) -> None:
    """Fails if a backward that computes layers again counts a router twice or leaves tokens out that only the routers'
    losses reach, or if rows that are opened lose their part."""
    rows = pack_trees(forest(), OBJECTIVE, 17, dtype=torch.float64, max_prefix=500)
    assert max(row.depth for row in rows) > 0
    plain, policy = gradients(name, rows, weights=(BALANCE, Z))
    again, other = gradients(name, rows, choice="layer", weights=(BALANCE, Z))
    assert difference(again, plain) < 1e-12
    assert policy.router_loss is not None and other.router_loss is not None
    torch.testing.assert_close(other.router_loss.total, policy.router_loss.total, rtol=1e-12, atol=0)
    assert float(policy.router_loss.total) > BALANCE  # a balance is never below the number of experts a token goes to
    assert difference(gradients(name, rows)[0], plain) > 1e-3


@pytest.mark.parametrize("name", ["qwen3", "nemotron_h", "gemma4"])
def test_models_without_such_losses_are_refused(name: str) -> None:
    """Fails if a weight is taken and nothing happens, or a loss is made up for routers that train in another way."""
    assert name in FAMILIES
    with pytest.raises(ValueError, match=r"transformers has no auxiliary loss.*model\.router_balance_coef"):
        Policy(make(name), router_balance=0.1)
