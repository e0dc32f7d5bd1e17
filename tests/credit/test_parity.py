"""Credit equals slow loops over trajectories written out, from the formulas of the papers (docs/design.md#credit).

Every leaf is written out as often as it counts; the loops know nothing of trees but the path and the question of each
trajectory. Differences are float64 roundings: sums of at most some hundred terms of size one, so far below 1e-12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from atpo_fast import TurnTree, assign_credit

E = 1e-6
SEEDS = range(12)


@dataclass(frozen=True)
class Trajectory:
    question: str
    tree: int
    path: tuple[int, ...]  # turns after the prompt
    reward: float
    tokens: int  # action tokens


def random_forest(seed: int) -> list[TurnTree]:
    """Questions of one to three trees, not always side by side, with multiplicities, single leaves and empty turns."""
    rng = np.random.default_rng(seed)
    trees = []
    for question in "aabcabddd":
        tree = TurnTree([1, 2], question_id=question)
        for n in range(int(rng.integers(1, 9))):
            parent = int(rng.integers(0, n + 1))
            action = int(rng.integers(0 if parent else 1, 5))
            tree.add_turn(parent, rng.integers(0, 9, action), -rng.random(action), [3])
        for leaf in tree.leaves:
            tree.set_reward(leaf, float(rng.choice([-1.0, 0.0, 0.3, 1.0])))
            tree.set_multiplicity(leaf, int(rng.choice([1, 1, 1, 2, 4])))
        trees.append(tree)
    return trees


def written_out(trees: Sequence[TurnTree]) -> list[Trajectory]:
    return [
        Trajectory(
            question=tree.question_id,
            tree=t,
            path=tuple(tree.path(leaf)[1:]),
            reward=tree.turns[leaf].reward or 0.0,
            tokens=sum(len(tree.turns[n].action_ids) for n in tree.path(leaf)),
        )
        for t, tree in enumerate(trees)
        for leaf in tree.leaves
        for _ in range(tree.turns[leaf].multiplicity)
    ]


def z_score(value: float, group: Sequence[float]) -> float:
    """Standardise by the sample std; a group of one has mean 0 and std 1."""
    if len(group) == 1:
        return value / (1 + E)
    if len(set(group)) == 1:
        return 0.0  # not a rounding of 1e-16 over 1e-6
    mean = math.fsum(group) / len(group)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in group) / (len(group) - 1))
    return (value - mean) / (std + E)


def grpo(all_: list[Trajectory]) -> list[float]:
    return [z_score(y.reward, [o.reward for o in all_ if o.question == y.question]) for y in all_]


def tree_grpo(all_: list[Trajectory]) -> list[float]:
    within = [z_score(y.reward, [o.reward for o in all_ if o.tree == y.tree]) for y in all_]
    return [between + inner for between, inner in zip(grpo(all_), within, strict=True)]


def rloo(all_: list[Trajectory]) -> list[float]:
    advantages = []
    for i, y in enumerate(all_):
        others = [o.reward for j, o in enumerate(all_) if o.question == y.question and j != i]
        advantages.append(y.reward - math.fsum(others) / len(others) if others else 0.0)
    return advantages


def whitened(all_: list[Trajectory], values: Sequence[float]) -> list[float]:
    """Whiten the values over action tokens, each written out."""
    tokens = [value for y, value in zip(all_, values, strict=True) for _ in range(y.tokens)]
    mean = math.fsum(tokens) / len(tokens)
    variance = math.fsum((x - mean) ** 2 for x in tokens) / (len(tokens) - 1)
    return [(value - mean) / math.sqrt(variance + 1e-8) for value in values]


def reinforce_plus_plus(all_: list[Trajectory]) -> list[float]:
    centred = []
    for y in all_:
        group = [o.reward for o in all_ if o.question == y.question]
        centred.append(y.reward - (math.fsum(group) / len(group) if len(group) > 1 else 0.0))
    return whitened(all_, centred)


def treepo(all_: list[Trajectory], ancestors: str) -> list[float]:
    advantages = []
    for y in all_:
        groups = [[o.reward for o in all_ if o.question == y.question]]
        for n in y.path[:-1]:
            below = [o.reward for o in all_ if o.tree == y.tree and n in o.path]
            groups += [below] if len(below) > 1 else []
        weights = [len(group) if ancestors == "leaves" else 1 for group in groups]
        terms = [w * (y.reward - math.fsum(g) / len(g)) for w, g in zip(weights, groups, strict=True)]
        advantages.append(math.fsum(terms) / sum(weights))
    return whitened(all_, advantages)


Loop = Callable[[list[Trajectory]], list[float]]
LOOPS: dict[str, Loop] = {
    "grpo": grpo,
    "tree_grpo": tree_grpo,
    "rloo": rloo,
    "reinforce++": reinforce_plus_plus,
    "treepo": lambda all_: treepo(all_, "leaves"),
    "treepo, equal": lambda all_: treepo(all_, "equal"),
}


# Fails when a question's trees are not compared with each other, a copy does not count, or a sample is a population.
@pytest.mark.parametrize("method", LOOPS)
def test_trajectory_credit(method: str) -> None:
    for seed in SEEDS:
        trees = random_forest(seed)
        name, _, ancestors = method.partition(", ")
        assign_credit(trees, name, ancestors=ancestors or "leaves")
        all_ = written_out(trees)
        for y, expected in zip(all_, LOOPS[method](all_), strict=True):
            leaf_advantages = trees[y.tree].leaf_advantages
            assert leaf_advantages is not None
            assert leaf_advantages[y.path[-1]] == pytest.approx(expected, abs=1e-12), (seed, y)


def value_of(tree: TurnTree, turn: int, rewards: dict[int, float], value: str) -> float:
    """V of a turn by recursion; a leaf that counts m times is m children of its parent."""
    children = tree.turns[turn].children
    if not children:
        return rewards[turn]
    copies = [c for c in children for _ in range(tree.turns[c].multiplicity)]
    weights = [math.exp(tree.turns[c].nll) if value == "child_softmax" else 1.0 for c in copies]
    values = [value_of(tree, c, rewards, value) for c in copies]
    return math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)


# Fails when copies of a leaf are left out of the children, of the softmax, or of mean and std.
@pytest.mark.parametrize("value", ["child_softmax", "child_mean"])
def test_turn_values(value: str) -> None:
    for seed in SEEDS:
        trees = random_forest(seed)
        assign_credit(trees, value=value)
        for tree in trees:
            copies = [tree.turns[n].reward or 0.0 for n in tree.leaves for _ in range(tree.turns[n].multiplicity)]
            std = float(np.std(copies))
            mean = math.fsum(copies) / len(copies) if len(set(copies)) > 1 else copies[0]
            rewards = {n: ((tree.turns[n].reward or 0.0) - mean) / (std + E) for n in tree.leaves}
            expected = [value_of(tree, n, rewards, value) for n in range(len(tree))]
            assert tree.values == pytest.approx(expected, abs=1e-12), seed
