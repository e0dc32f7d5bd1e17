"""Every preset against a slow loop over the published formulas: loss and derivatives in float64, on random forests."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from atpo_fast import Objective, TurnTree, pack_trees
from atpo_fast.common.presets import PRESETS
from atpo_fast.packing import PackedTrees, apply_entropy_advantage
from atpo_fast.policy.head import PolicyHead
from tests.helpers.slow_objective import METHODS, Batch, Method, Place, regions, slow_loss

DOUBLE = torch.float64
# A log-ratio of 10 is off by some 20 roundings of 1e-15, a ratio of exp(10) = 2e4 by 4e-10, and no weight exceeds 1/50.
TOLERANCE = 1e-9
VOCAB = 50


def random_tree(rng: np.random.Generator, name: str, by_turn: bool) -> TurnTree:
    """A tree of 9 turns with advantages of both signs and of 0, by turn or by leaf, and a leaf that counts twice."""
    tree = TurnTree(rng.integers(0, VOCAB, 2), question_id=name)
    for n in range(9):
        parent = int(rng.integers(0, n + 1)) if n > 3 else 0
        action = rng.integers(0, VOCAB, 1 + n % 4)
        tree.add_turn(parent, action, -3 * rng.random(len(action)), rng.integers(0, VOCAB, n % 3))
    tree.set_multiplicity(tree.leaves[-1], 2)
    numbers = rng.normal(size=len(tree)) * (rng.random(len(tree)) < 0.9)
    tree.advantages = numbers if by_turn else np.zeros(len(tree))
    if not by_turn:
        tree.leaf_advantages = np.full(len(tree), np.nan)
        tree.leaf_advantages[tree.leaves] = numbers[tree.leaves]
    return tree


def random_batch(method: Method, seed: int) -> Batch:
    """A forest of a tree for every region of the ratio, all of whose tokens lie there, and three where turns differ."""
    rng = np.random.default_rng(seed)
    centres = list(regions(method).values())
    by_tree = [[centre] * 20 for centre in centres] + [rng.choice(centres, 20).tolist() for _ in range(3)]
    trees = [random_tree(rng, f"q{t}", method.level == "turn") for t in range(len(by_tree))]
    batch = Batch(trees, {}, {}, {}, {})
    for t, (tree, centres) in enumerate(zip(trees, by_tree, strict=True)):
        noise = 2e-5 if t < len(regions(method)) else 0.01
        for n, turn in enumerate(tree.turns):
            for i, old in enumerate(turn.logprobs.tolist()):
                place = (t, n, i)
                batch.log_ratio[place] = centres[n] + noise * rng.normal()
                batch.old[place] = old
                batch.ref[place] = batch.logprob(place) + float(rng.choice([0.5, -0.5, 4.0, 25.0])) * rng.random()
                # a few tokens are far below the mean: their factor is negative
                batch.entropy[place] = rng.random() if rng.random() > 0.02 else -20.0
    return batch


def places(row: PackedTrees) -> list[Place]:
    """Tree, turn and place of every action token of a row."""
    found = []
    for n, (start, end) in enumerate(pairwise(row.turn_offsets.tolist())):
        found += [(int(row.turn_tree[n]), int(row.turn_index[n]), i) for i in range(end - start)]
    return found


def evaluated(batch: Batch, objective: Objective) -> tuple[float, dict[Place, float], dict[Place, float]]:
    """The loss of the packed forest, and its gradients by log-prob and entropy, summed over the rows."""
    longest = max(len(tree.path_ids(leaf)) for tree in batch.trees for leaf in tree.leaves)
    rows = pack_trees(batch.trees, objective, longest + 3, dtype=DOUBLE)  # trees are cut, and turns repeated
    assert len(rows) > len(batch.trees)

    def by_row(number: Callable[[Place], float]) -> list[Tensor]:
        return [torch.tensor([number(place) for place in places(row)], dtype=DOUBLE) for row in rows]

    numbers = by_row(batch.logprob), by_row(batch.ref.__getitem__), by_row(batch.entropy.__getitem__)
    rows = apply_entropy_advantage(rows, numbers[2], objective)
    total, by_logprob, by_entropy = 0.0, dict.fromkeys(batch.old, 0.0), dict.fromkeys(batch.old, 0.0)
    for row, logprob, ref, entropy in zip(rows, *numbers, strict=True):
        row.ref_logprob = ref
        leaves = logprob.requires_grad_(), entropy.requires_grad_()
        loss = objective.evaluate(logprob, row, entropy).loss
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)
        total += loss.item()
        for place, first, second in zip(places(row), *(g.tolist() for g in grads), strict=True):
            by_logprob[place] += first
            by_entropy[place] += second
    return total, by_logprob, by_entropy


def assert_same(batch: Batch, objective: Objective, method: Method) -> set[tuple[str, str]]:
    """Loss and derivatives agree; returns the cases that occurred."""
    expected = slow_loss(batch, method)
    loss, by_logprob, by_entropy = evaluated(batch, objective)
    assert loss == pytest.approx(expected.loss, rel=TOLERANCE, abs=TOLERANCE)
    for found, wanted in ((by_logprob, expected.by_logprob), (by_entropy, expected.by_entropy)):
        for place, value in found.items():
            assert value == pytest.approx(wanted.get(place, 0.0), rel=TOLERANCE, abs=TOLERANCE), place
    return expected.cases


# Fails when a preset has another constant, clip, cap, average, KL or bonus than its source, when a gradient survives
# the dual cap or the cap of the log-ratio, or when the sign that clips is not that of the changed advantage (aepo).
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_the_published_loss(name: str, seed: int) -> None:
    method = METHODS[name]
    cases = assert_same(random_batch(method, seed), Objective.preset(name), method)
    wanted = {(sign, region) for sign in "+-" for region in regions(method)}
    wanted |= {("kl", "bounded"), ("kl", "free")} if method.kl else set()
    wanted |= {("changed sign", "+"), ("changed sign", "-")} if method.by_entropy else set()
    assert cases == wanted


def with_ranges(batch: Batch, seed: int) -> Batch:
    """The same batch, some of whose turns have clip ranges of their own."""
    rng = np.random.default_rng(seed)
    for tree in batch.trees[::2]:
        tree.clip_low, tree.clip_high = (0.9 * rng.random(len(tree)) for _ in range(2))
        tree.clip_low[rng.random(len(tree)) < 0.3] = np.nan
    batch.trees[1].clip_high = 0.9 * rng.random(len(batch.trees[1]))
    return batch


# Fails when a row loses the ranges of its turns, gives them to other turns, or turns without one lose the objective's.
@pytest.mark.parametrize("name", ["at2po", "grpo", "gppo", "cispo"])
def test_clip_ranges_of_turns(name: str) -> None:
    method = METHODS[name]
    batch = random_batch(method, 2)
    before = slow_loss(batch, method).by_logprob
    assert_same(with_ranges(batch, 3), Objective.preset(name), method)
    assert slow_loss(batch, method).by_logprob != before


# Fails when the policy's head, which trains, forgets the ranges that `evaluate` reads.
def test_head_reads_the_clip_ranges() -> None:
    torch.manual_seed(0)
    batch = with_ranges(random_batch(METHODS["at2po"], 0), 1)
    head = PolicyHead(nn.Linear(4, VOCAB, dtype=DOUBLE))
    for row in pack_trees(batch.trees, Objective.preset("at2po"), 40, dtype=DOUBLE):
        assert row.clip_low is not None and len(row.clip_low) == row.num_turns
        hidden = torch.randn(row.num_actions, 4, dtype=DOUBLE)
        logprob, entropy = head(hidden, row)
        row.old_logprob = (logprob + 0.3 * torch.randn(row.num_actions, dtype=DOUBLE)).detach()
        expected = Objective.preset("at2po").evaluate(logprob, row, entropy)
        torch.testing.assert_close(
            head(hidden, row, Objective.preset("at2po")).coef, expected.coef, rtol=1e-12, atol=1e-14
        )


# Fails when ranges that an objective cannot use, or that are no ranges, are packed in silence.
def test_refused_ranges() -> None:
    batch = with_ranges(random_batch(METHODS["at2po"], 0), 1)
    for name, why in (("gspo", "ratio level sequence"), ("sapo", "clip sapo")):
        with pytest.raises(ValueError, match=f"clip_low for each turn, which {why} cannot use"):
            pack_trees(batch.trees, Objective.preset(name), 100)
    for wrong in (np.full(10, -0.1), np.zeros(3)):
        batch.trees[1].clip_low = wrong
        with pytest.raises(ValueError, match=r"tree 1 \('q1'\): clip_low must be one number of at least 0"):
            pack_trees(batch.trees, Objective.preset("at2po"), 100)


# Fails when a row without such ranges carries tensors for nothing.
def test_no_ranges_no_fields() -> None:
    rows = pack_trees(random_batch(METHODS["at2po"], 0).trees, Objective.preset("at2po"), 40)
    assert all(row.clip_low is None and row.clip_high is None for row in rows)


# Fails when an impossible combination is found after the first roll-out only, or a removed clip has no successor.
def test_objectives_that_make_no_sense() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"clip": "dual"}, "clip='hard' and dual_cap=3"),
        ({"level": "sequence"}, "entropy_advantage=0.2"),
        ({"aggregation": "mean"}, "aggregation='mean': must be one of seq-mean-token-mean"),
    ]
    for overrides, message in bad:
        with pytest.raises(ValueError, match=message):
            Objective.preset("aepo", **overrides)
