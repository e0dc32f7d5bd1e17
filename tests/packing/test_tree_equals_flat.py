"""Packed trees give the loss and every gradient of the flat trajectories, in float64 (docs/design.md#deduplication)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.packing import apply_entropy_advantage, empty_row, pruned_tokens, spread_rows
from tests.helpers.flat_reference import (
    DOUBLE,
    ToyModel,
    assert_equal,
    exact_norms,
    fill_like_flat,
    flat_loss,
    flatten,
    packed_loss,
    visible_keys,
)
from tests.helpers.strategies import VOCAB, forests, special_forest

LEVELS = ("token", "turn", "sequence")
CLIPS = ("hard", "soft", "soft_high", "sapo", "cispo")
CAPS = (None, 1.3)  # of the dual clip
ADVANTAGES = ("at2po", "grpo")  # per turn; per trajectory
AGGREGATIONS = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "turn-mean")
# ranges that leave ratios inside, below, above, and above the dual cap; see `on_policy_with_noise`
RANGES = {"clip_low": 0.1, "clip_high": 0.15, "max_length": 11}


def on_policy_with_noise(trees: Sequence[TurnTree], model: ToyModel) -> None:
    """Old log-probs = the model's + noise, so that ratios lie on both sides of the clip range."""
    rng = np.random.default_rng(3)
    for tree in trees:
        for n, turn in enumerate(tree.turns):
            ids = torch.from_numpy(tree.path_ids(n))
            end = len(ids) - len(turn.observation_ids)
            places = torch.arange(end - len(turn.action_ids), end)
            with torch.no_grad():
                table = model(ids, torch.arange(len(ids)), torch.ones(len(ids), len(ids)).tril().bool()).log_softmax(-1)
            turn.logprobs = table[places - 1, ids[places]].numpy() + rng.normal(0, 0.25, len(places))


@pytest.fixture(scope="module")
def model() -> ToyModel:
    return ToyModel(VOCAB)


@pytest.fixture(scope="module", params=ADVANTAGES)
def forest(request: pytest.FixtureRequest, model: ToyModel) -> list[TurnTree]:
    trees = special_forest()
    assign_credit(trees, request.param)
    on_policy_with_noise(trees, model)
    return trees


def longest_path(trees: Sequence[TurnTree]) -> int:
    return max(len(flat.ids) for flat in flatten(trees))


# Every level and clip mode, with and without a cap: one of both with advantages by turn, the other by trajectory.
OBJECTIVES = [
    (ADVANTAGES[(i + j + k) % 2], level, clip, cap)
    for (i, level), (j, clip), (k, cap) in itertools.product(*map(enumerate, (LEVELS, CLIPS, CAPS)))
]


# Fails when: a weight misses a trajectory or its multiplicity, signs of advantages cancel before they are summed, a
# turn's ratio takes a neighbour's tokens, a predictor of a first token is not the parent's last, positions or
# visibility leak between siblings, a path table points to the wrong turns, or a clip mode differs for one sign.
@pytest.mark.parametrize(("forest", "level", "clip", "cap"), OBJECTIVES, indirect=["forest"])
def test_every_objective(forest: list[TurnTree], model: ToyModel, level: str, clip: str, cap: float | None) -> None:
    objective = Objective.preset("at2po", level=level, clip=clip, dual_cap=cap, **RANGES)
    flat = flat_loss(model, flatten(forest), objective)
    assert_equal(packed_loss(model, pack_trees(forest, objective, 1000, dtype=DOUBLE), objective), flat, model)


# Fails when a weight counts the wrong trajectories, turns or tokens.
@pytest.mark.parametrize(("level", "aggregation"), list(itertools.product(LEVELS, AGGREGATIONS)))
def test_every_aggregation(forest: list[TurnTree], model: ToyModel, level: str, aggregation: str) -> None:
    objective = Objective.preset("at2po", level=level, aggregation=aggregation, **RANGES)
    flat = flat_loss(model, flatten(forest), objective)
    assert_equal(packed_loss(model, pack_trees(forest, objective, 1000, dtype=DOUBLE), objective), flat, model)


# Fails when W0 or the log-probs beside the policy's are misplaced, or pruning drops tokens that KL or entropy need.
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "extra",
    [{"kl": kl, "kl_coef": 0.3} for kl in ("k1", "k2", "k3")] + [{"entropy_coef": 0.2}, {"importance_cap": 1.02}],
    ids=lambda extra: "-".join(map(str, extra.values())),
)
def test_terms_beside_the_policy(forest: list[TurnTree], model: ToyModel, level: str, extra: dict[str, float]) -> None:
    objective = Objective.preset("at2po", level=level, **RANGES, **extra)
    flat = flat_loss(model, flatten(forest), objective)
    rows = pack_trees(forest, objective, longest_path(forest) + 3, dtype=DOUBLE)
    assert_equal(packed_loss(model, rows, objective, fill_like_flat), flat, model)


# Fails when a cut loses a turn, counts a repeated one twice, or breaks a path; budgets go down to the longest path.
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("extra_tokens", [0, 1, 5, 20, 1000])
def test_any_budget_gives_the_same_sum(forest: list[TurnTree], model: ToyModel, level: str, extra_tokens: int) -> None:
    objective = Objective.preset("at2po", level=level, kl="k3", kl_coef=0.1, **RANGES)
    budget = longest_path(forest) + extra_tokens
    rows = pack_trees(forest, objective, budget, dtype=DOUBLE)
    assert all(row.num_tokens <= budget for row in rows)
    assert sum(row.num_trajectories for row in rows) == sum(len(tree.leaves) for tree in forest)
    flat = flat_loss(model, flatten(forest), objective)
    assert_equal(packed_loss(model, rows, objective, fill_like_flat), flat, model)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    trees=forests(),
    level=st.sampled_from(LEVELS),
    clip=st.sampled_from(CLIPS),
    cap=st.sampled_from(CAPS),
    aggregation=st.sampled_from(AGGREGATIONS),
    slack=st.integers(0, 30),
    prune=st.booleans(),
)
def test_random_forests(
    trees: list[TurnTree], level: str, clip: str, cap: float | None, aggregation: str, slack: int, prune: bool
) -> None:
    """Any forest, objective and budget: the same loss and gradients."""
    model = ToyModel(VOCAB)
    on_policy_with_noise(trees, model)
    objective = Objective.preset("at2po", level=level, clip=clip, dual_cap=cap, aggregation=aggregation, **RANGES)
    rows = pack_trees(trees, objective, longest_path(trees) + slack, dtype=DOUBLE, prune=prune)
    assert_equal(packed_loss(model, rows, objective), flat_loss(model, flatten(trees), objective), model)


# Fails when pruning removes something with a gradient, or forgets pruned trajectories in the denominators.
@pytest.mark.parametrize("level", LEVELS)
def test_pruning_is_exact(forest: list[TurnTree], model: ToyModel, level: str) -> None:
    objective = Objective.preset("at2po", level=level, **RANGES)
    pruned = pack_trees(forest, objective, 1000, dtype=DOUBLE)
    whole = pack_trees(forest, objective, 1000, dtype=DOUBLE, prune=False)
    equal, failed = forest[3].unique_tokens, forest[4].unique_tokens
    assert pruned_tokens(forest, whole) == failed
    assert pruned_tokens(forest, pruned) >= equal + failed
    assert_equal(packed_loss(model, pruned, objective), packed_loss(model, whole, objective), model)


# Fails when a row of padding adds to the loss, has a gradient, or cuts the graph (a collective would hang).
def test_spread_rows_with_empty_rows(forest: list[TurnTree], model: ToyModel) -> None:
    objective = Objective.preset("at2po", **RANGES)
    rows = pack_trees(forest, objective, longest_path(forest), dtype=DOUBLE)
    ranks = spread_rows(rows, 3)
    assert len({len(rank) for rank in ranks}) == 1
    flat = flat_loss(model, flatten(forest), objective)
    assert_equal(packed_loss(model, [row for rank in ranks for row in rank], objective), flat, model)
    for level in LEVELS:
        nothing = packed_loss(model, [empty_row(DOUBLE)], objective.with_(level=level))
        assert nothing.item() == 0
        assert nothing.requires_grad


# Fails when an observation token is scored, or a hidden state other than the predictors' reaches the loss.
def test_observations_get_no_gradient(forest: list[TurnTree], model: ToyModel) -> None:
    objective = Objective.preset("at2po", kl="k3", kl_coef=0.1, entropy_coef=0.1, **RANGES)
    for row in pack_trees(forest, objective, 1000, dtype=DOUBLE, prune=False):
        logits = model(row.input_ids, row.position_ids, visible_keys(row)).detach().requires_grad_()
        table = logits.log_softmax(-1)[row.predictor]
        logp = table.gather(1, row.targets[:, None])[:, 0]
        objective.loss(logp, row, -(table.exp() * table).sum(-1)).backward()
        scored = set(row.predictor.tolist())
        for k in range(row.num_tokens):
            if k not in scored:
                assert logits.grad is not None and logits.grad[k].abs().max() == 0
    actions = sum(len(t.action_ids) for tree in forest for t in tree.turns)
    assert actions == sum(row.num_actions for row in pack_trees(forest, objective, 1000, prune=False))


# Fails when statistics miss multiplicities, a negative factor keeps the sign, or only one of W+ and W- is scaled.
@pytest.mark.parametrize("strength", [0.2, 3.0])  # published; large enough for negative factors
def test_entropy_advantage(forest: list[TurnTree], model: ToyModel, strength: float) -> None:
    objective = Objective.preset("aepo", entropy_advantage=strength, **RANGES)
    rows = pack_trees(forest, objective, longest_path(forest), dtype=DOUBLE)
    with torch.no_grad():
        tables = [model(r.input_ids, r.position_ids, visible_keys(r)).log_softmax(-1)[r.predictor] for r in rows]
    packed = apply_entropy_advantage(rows, [-(t.exp() * t).sum(-1) for t in tables], objective)
    flats = flatten(forest)
    entropies: list[Tensor] = []
    for flat in flats:
        size = len(flat.ids)
        with torch.no_grad():
            table = model(torch.tensor(flat.ids), torch.arange(size), torch.ones(size, size).tril().bool()).log_softmax(
                -1
            )
        entropies.append(-(table.exp() * table).sum(-1).roll(1))
    every = torch.cat([h[torch.tensor(flat.mask).bool()] for h, flat in zip(entropies, flats, strict=True)])
    changed = []
    for h, flat in zip(entropies, flats, strict=True):
        factor = 1 + strength * (h - every.mean()) / every.std()
        advantage = [a * f for a, f in zip(flat.advantage, factor.tolist(), strict=True)]
        changed.append(type(flat)(flat.ids, flat.mask, advantage, flat.turn, flat.old, flat.rollout, flat.ref))
    assert_equal(packed_loss(model, packed, objective), flat_loss(model, changed, objective), model)


# The same on a real architecture: rotary positions, grouped heads, normalisation. Fails when positions are row indices.
@pytest.mark.parametrize("level", LEVELS)
def test_on_qwen3(forest: list[TurnTree], level: str) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 16}
    config = Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, attn_implementation="sdpa")
    qwen = exact_norms(Qwen3ForCausalLM(config).double())

    def logits(ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        mask = torch.zeros(visible.shape, dtype=DOUBLE).masked_fill(~visible, -torch.inf)
        return qwen(ids[None], position_ids=positions[None], attention_mask=mask[None, None], use_cache=False).logits[0]

    objective = Objective.preset("at2po", level=level, clip_low=0.5, clip_high=0.5, entropy_coef=0.01)
    flat = flat_loss(logits, flatten(forest), objective)
    rows = pack_trees(forest, objective, longest_path(forest) + 8, dtype=DOUBLE)
    assert_equal(packed_loss(logits, rows, objective), flat, qwen)
