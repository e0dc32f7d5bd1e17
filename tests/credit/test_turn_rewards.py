"""Credit from rewards of turns equals slow loops over trajectories written out (docs/design.md#turn-rewards)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.tree import as_forest
from tests.credit.test_parity import SEEDS, Trajectory, random_forest, written_out, z_score

Rewards = list[list[float]]  # of every turn of every trajectory


def forest_with_rewards(seed: int) -> list[TurnTree]:
    """A random forest, with rewards of turns and log-probs of the gold answer."""
    trees = random_forest(seed)
    rng = np.random.default_rng(seed)
    for tree in trees:
        tree.turn_rewards = rng.choice([0.0, -0.1, -0.25], len(tree))
        gold = -3 * rng.random(len(tree))
        tree.gold_logprob = np.where([bool(turn.children) for turn in tree.turns], gold, np.nan)
    return trees


def acting(trees: Sequence[TurnTree], y: Trajectory) -> list[int]:
    """The turns of a trajectory that have action tokens."""
    return [n for n in y.path if len(trees[y.tree].turns[n].action_ids)]


def ahead(values: list[float], k: int, discount: float) -> float:
    return math.fsum(discount ** (j - k) * values[j] for j in range(k, len(values)))


def gain(tree: TurnTree, turn: int) -> float:
    assert tree.gold_logprob is not None
    return math.exp(tree.gold_logprob[turn]) - math.exp(tree.gold_logprob[tree.turns[turn].parent])


def gains_and_outcome(trees: Sequence[TurnTree], all_: list[Trajectory]) -> Rewards:
    found = []
    for y in all_:
        own, rewards = acting(trees, y), trees[y.tree].turn_rewards
        assert rewards is not None
        scores = [*(gain(trees[y.tree], n) for n in own[:-1]), y.reward]
        found.append([score + float(rewards[n]) for n, score in zip(own, scores, strict=True)])
    return found


def pooled(all_: list[Trajectory], values: Rewards) -> Rewards:
    """Standardise over all turns of all trajectories of the question."""
    group = {q: [x for y, xs in zip(all_, values, strict=True) if y.question == q for x in xs] for q in "abcd"}
    return [[z_score(x, group[y.question]) for x in xs] for y, xs in zip(all_, values, strict=True)]


def gtpo(trees: Sequence[TurnTree], all_: list[Trajectory], discount: float) -> Rewards:
    returns = []
    for y in all_:
        rewards = trees[y.tree].turn_rewards
        assert rewards is not None
        own = [float(rewards[n]) for n in acting(trees, y)]
        own[-1] += y.reward
        returns.append([ahead(own, k, discount) for k in range(len(own))])
    return pooled(all_, returns)


def igpo(trees: Sequence[TurnTree], all_: list[Trajectory], discount: float) -> Rewards:
    scores = pooled(all_, gains_and_outcome(trees, all_))
    return [[ahead(own, k, discount) for k in range(len(own))] for own in scores]


def a2tgpo_scores(trees: Sequence[TurnTree], all_: list[Trajectory]) -> Rewards:
    rewards = gains_and_outcome(trees, all_)
    scores = []
    for y, own in zip(all_, rewards, strict=True):
        peers = [xs for o, xs in zip(all_, rewards, strict=True) if o.question == y.question]
        found = [z_score(own[k], [xs[k] for xs in peers if k < len(xs) - 1]) for k in range(len(own) - 1)]
        scores.append([*found, z_score(own[-1], [xs[-1] for xs in peers])])
    return scores


def a2tgpo(trees: Sequence[TurnTree], all_: list[Trajectory], discount: float) -> Rewards:
    scores = a2tgpo_scores(trees, all_)
    return [[ahead(own, k, discount) / math.sqrt(len(own) - k) for k in range(len(own))] for own in scores]


def by_turn(trees: Sequence[TurnTree], all_: list[Trajectory], values: Rewards) -> list[list[float]]:
    """The mean of a turn over the trajectories through it; 0 for turns without action tokens."""
    found: dict[tuple[int, int], list[float]] = {}
    for y, own in zip(all_, values, strict=True):
        for n, value in zip(acting(trees, y), own, strict=True):
            found.setdefault((y.tree, n), []).append(value)
    mean = {at: math.fsum(values) / len(values) for at, values in found.items()}
    return [[mean.get((t, n), 0.0) for n in range(len(tree))] for t, tree in enumerate(trees)]


Loop = Callable[[Sequence[TurnTree], list[Trajectory], float], Rewards]
LOOPS: dict[str, tuple[Loop, float]] = {"gtpo": (gtpo, 0.9), "igpo": (igpo, 1.0), "a2tgpo": (a2tgpo, 1.0)}


# Fails when a discount counts from the wrong end, the outcome is given to another turn than the last, a shared turn is
# counted once in the statistics, gains are compared with another turn than the one before, or trees with each other's
# questions.
@pytest.mark.parametrize("discount", [None, 0.6])
@pytest.mark.parametrize("method", LOOPS)
def test_turn_credit(method: str, discount: float | None) -> None:
    loop, usual = LOOPS[method]
    for seed in SEEDS:
        trees = forest_with_rewards(seed)
        assign_credit(trees, method, discount=discount)
        all_ = written_out(trees)
        expected = by_turn(trees, all_, loop(trees, all_, usual if discount is None else discount))
        for tree, values in zip(trees, expected, strict=True):
            assert tree.advantages == pytest.approx(values, abs=1e-12), (seed, tree.question_id)
            assert tree.leaf_advantages is None and (tree.clip_scale is None) == (method != "a2tgpo")


# Fails when a turn's reward is left out of a trajectory that it lies on, is counted for another, or is discounted from
# the wrong end; or when rewards of turns change credit without any.
@pytest.mark.parametrize("discount", [None, 1.0, 0.6])
@pytest.mark.parametrize("method", ["at2po", "grpo", "tree_grpo", "rloo", "reinforce++", "passk", "treepo"])
def test_other_methods_sum_the_rewards_of_turns(method: str, discount: float | None) -> None:
    for seed in SEEDS[:3]:
        trees, summed = forest_with_rewards(seed), forest_with_rewards(seed)
        for y in written_out(summed):
            rewards, own = trees[y.tree].turn_rewards, acting(trees, y)
            assert rewards is not None
            earned = [float(rewards[n]) for n in own]
            if own:
                earned[-1] += y.reward
                summed[y.tree].turns[y.path[-1]].reward = ahead(earned, 0, discount or 1.0)
        for tree in summed:
            tree.turn_rewards = None
        assign_credit(trees, method, discount=discount)
        assign_credit(summed, method)
        for tree, expected in zip(trees, summed, strict=True):
            assert tree.advantages == pytest.approx(expected.advantages, abs=1e-12), (seed, tree.question_id)
            assert tree.values == pytest.approx(expected.values, abs=1e-12)


# Fails when a narrow range is widened, the outcome moves the range of a last turn, or turns without tokens get range 0.
def test_clip_scales() -> None:
    for seed in SEEDS:
        trees = forest_with_rewards(seed)
        assign_credit(trees, "a2tgpo", clip_spread=0.4)
        all_ = written_out(trees)
        scale = [[*(1 + 0.4 * math.tanh(x) for x in own[:-1]), 1.0] for own in a2tgpo_scores(trees, all_)]
        for tree, expected in zip(trees, by_turn(trees, all_, scale), strict=True):
            assert tree.clip_scale == pytest.approx([x or 1.0 for x in expected], abs=1e-12), seed


# A turn of the question without a gold answer's log-prob, or with one that is not finite, has no gain.
def test_gains_have_to_be_measured() -> None:
    """Fails if information gain is taken for 0 where nothing was measured."""
    tree = random_forest(0)[0]
    with pytest.raises(ValueError, match="information_gain"):
        assign_credit([tree], "igpo")
    tree.gold_logprob = np.full(len(tree), np.nan)
    with pytest.raises(ValueError, match="gold_logprob of turn 0 is nan"):
        assign_credit([tree], "a2tgpo")


AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "turn-mean")


# Under token-mean every action token then has the weight 1 / (action tokens of the trees). Under the others a shared
# token is split among its trajectories: a trajectory's tokens are the sum of 1 / (trajectories through the token), and
# the weights of all tokens still sum to 1. Fails when denominators count the copies, or a copied leaf counts twice.
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_shared_turns_count_once(aggregation: str) -> None:
    for seed in SEEDS:
        trees = random_forest(seed)
        assign_credit(trees, "grpo", shared_turns="once")
        objective = Objective(aggregation=aggregation)  # type: ignore[arg-type]
        (row,) = pack_trees(trees, objective, 1 << 20, dtype=torch.float64, prune=False)
        all_ = written_out(trees)
        through = {(y.tree, n): sum(o.tree == y.tree and n in o.path for o in all_) for y in all_ for n in y.path}
        weight: dict[tuple[int, int], float] = {}
        for y in all_:
            lengths = {n: len(trees[y.tree].turns[n].action_ids) for n in acting(trees, y)}
            own = {n: 1 / through[y.tree, n] for n in lengths}
            tokens, turns = sum(lengths[n] * own[n] for n in lengths), sum(own.values())
            for n, length in lengths.items():
                unique = sum(len(turn.action_ids) for tree in trees for turn in tree.turns)
                each = {
                    "token-mean": own[n] / unique,
                    "seq-mean-token-mean": own[n] / len(all_) / tokens,
                    "turn-mean": own[n] / len(all_) / turns / length,
                }
                weight[y.tree, n] = weight.get((y.tree, n), 0.0) + each[aggregation]
        forest = as_forest(trees)
        bounds = row.turn_offsets.tolist()
        for i, (tree, turn) in enumerate(zip(row.turn_tree.tolist(), row.turn_index.tolist(), strict=True)):
            found = row.weight_all[bounds[i] : bounds[i + 1]].tolist()
            assert found == pytest.approx([weight[tree, turn]] * len(found), abs=1e-14), (seed, tree, turn)
        assert len(bounds) - 1 == int((forest.action_length > 0).sum())
        assign_credit(trees, "grpo")
        assert all(tree.turn_weight is None for tree in trees)


def test_weight_of_a_shared_turn() -> None:
    """Fails if the weight of a turn is off by a factor, which the averages of the loss would hide."""
    tree = TurnTree([1])
    shared = tree.add_turn(0, [2], [-1.0])
    for parent in (shared, shared, 0):
        tree.set_reward(tree.add_turn(parent, [3], [-1.0]), float(parent == 0))
    assign_credit([tree], "grpo", shared_turns="once")
    assert tree.turn_weight is not None and tree.turn_weight.tolist() == [1 / 3, 1 / 2, 1, 1, 1]


def test_a_trajectory_without_an_action_keeps_its_reward() -> None:
    """Fails if a leaf below no action takes what another trajectory earns from its first turn on."""
    tree = TurnTree([1])
    turn = tree.add_turn(0, [2], [-1.0])
    tree.set_reward(tree.add_turn(turn, [3], [-1.0]), 1.0)
    tree.set_reward(tree.add_turn(0, [], []), -1.0)
    tree.turn_rewards = np.array([0, 0.5, 0, 0])
    assign_credit([tree], "grpo", discount=0.5)  # 0.5 + 0.5 · 1 and -1: mean 0, deviation √2
    assert tree.leaf_advantages is not None
    np.testing.assert_allclose(tree.leaf_advantages[2:], [1 / math.sqrt(2), -1 / math.sqrt(2)], rtol=2e-6)
