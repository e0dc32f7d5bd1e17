"""Credit equals numbers worked out by hand for every method and option (docs/design.md#credit)."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_fast import TurnTree, assign_credit
from atpo_fast.credit import METHODS
from atpo_fast.credit.assign import VALUES
from tests.helpers.strategies import trees

E = 1e-6


def small_tree(question: str = "q", rewards: tuple[float, float, float] = (0.0, 1.0, 0.0)) -> TurnTree:
    """root -> a (H = ln 2), b (H = 0, leaf); a -> c (H = ln 3, leaf), d (H = 0, leaf). Turns 1 to 4 in that order."""
    tree = TurnTree([1, 2], question_id=question)
    a = tree.add_turn(0, [3, 4], [-math.log(4), 0.0], [5])
    b = tree.add_turn(0, [3], [0.0])
    c = tree.add_turn(a, [3], [-math.log(3)])
    d = tree.add_turn(a, [3], [0.0])
    for leaf, reward in zip((b, c, d), rewards, strict=True):
        tree.set_reward(leaf, reward)
    return tree


def leaf_advantages(tree: TurnTree) -> list[float]:
    assert tree.leaf_advantages is not None
    return [float(tree.leaf_advantages[leaf]) for leaf in tree.leaves]


# Without leaf_norm V(b) = 0, V(c) = 1, V(d) = 0, and
#   child_softmax  V(a) = 3/4 * 1 + 1/4 * 0 = 3/4   V(root) = 2/3 * 3/4 + 1/3 * 0 = 1/2
#   child_mean     V(a) = 1/2                       V(root) = 1/4
#   leaf_mean      V(a) = 1/2                       V(root) = 1/3
# With d counted three times, the children of a are c, d, d, d:
#   child_softmax  V(a) = 3/6 * 1 = 1/2   V(root) = 2/3 * 1/2 = 1/3
#   child_mean     V(a) = 1/4             V(root) = 1/8
#   leaf_mean      V(a) = 1/4             V(root) = 1/5
# Fails when entropies of the wrong turns weigh, weights are not normalised, or copies are not siblings.
@pytest.mark.parametrize(
    ("value", "copies_of_d", "root", "a"),
    [
        ("child_softmax", 1, 1 / 2, 3 / 4),
        ("child_mean", 1, 1 / 4, 1 / 2),
        ("leaf_mean", 1, 1 / 3, 1 / 2),
        ("child_softmax", 3, 1 / 3, 1 / 2),
        ("child_mean", 3, 1 / 8, 1 / 4),
        ("leaf_mean", 3, 1 / 5, 1 / 4),
    ],
)
def test_values(value: str, copies_of_d: int, root: float, a: float) -> None:
    tree = small_tree()
    tree.set_multiplicity(4, copies_of_d)
    assign_credit([tree], leaf_norm=False, value=value)
    assert tree.values == pytest.approx([root, a, 0, 1, 0], abs=1e-12)
    assert tree.advantages == pytest.approx(tree.values)
    assert tree.leaf_advantages is None


# Rewards 0, 1, 0: mean 1/3, population variance (1/9 + 4/9 + 1/9) / 3 = 2/9. With the sample std the numbers differ.
def test_leaf_norm() -> None:
    tree = small_tree()
    assign_credit([tree])
    std = math.sqrt(2 / 9) + E
    low, high = (-1 / 3) / std, (2 / 3) / std
    a = 3 / 4 * high + 1 / 4 * low
    assert tree.values == pytest.approx([2 / 3 * a + 1 / 3 * low, a, low, high, low], abs=1e-12)


# Rewards 0, 1 and three times 0: mean 1/5, population variance 4/25.
def test_leaf_norm_counts_multiplicity() -> None:
    tree = small_tree()
    tree.set_multiplicity(4, 3)
    assign_credit([tree])
    assert tree.values is not None
    assert tree.values[2:] == pytest.approx(np.array([-0.2, 0.8, -0.2]) / (0.4 + E), abs=1e-12)


# Values root 1/2, a 3/4, b 0, c 1, d 0 (above), so
#   diff_parent: a 1/4, b -1/2, c 1/4, d -3/4; diff_global: a 1/4, b -1/2, c 1/2, d -1/2; localglobal: their sum.
@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ("node_value", [1 / 2, 3 / 4, 0, 1, 0]),
        ("diff_parent", [0, 1 / 4, -1 / 2, 1 / 4, -3 / 4]),
        ("diff_global", [0, 1 / 4, -1 / 2, 1 / 2, -1 / 2]),
        ("diff_localglobal", [0, 1 / 2, -1, 3 / 4, -5 / 4]),
    ],
)
def test_advantages(advantage: str, expected: list[float]) -> None:
    for before in (
        [],
        [TurnTree([1])],
    ):  # without one, its root is turn 0 of the table
        tree = small_tree()
        assign_credit([*before, tree], leaf_norm=False, advantage=advantage)
        assert tree.advantages == pytest.approx(expected, abs=1e-12)


# Leaves b, c, d = 0, 1, 0: mean 1/3, sample variance (1/9 + 4/9 + 1/9) / 2 = 1/3.
def test_grpo() -> None:
    tree = small_tree()
    assign_credit([tree], "grpo")
    std = math.sqrt(1 / 3) + E
    low, high = (-1 / 3) / std, (2 / 3) / std
    assert leaf_advantages(tree) == pytest.approx([low, high, low], abs=1e-12)
    assert tree.leaf_advantages is not None and np.isnan(tree.leaf_advantages[:2]).all()
    assert tree.advantages == pytest.approx([(2 * low + high) / 3, (low + high) / 2, low, high, low], abs=1e-12)
    assert tree.values == pytest.approx([1 / 3, 1 / 2, 0, 1, 0], abs=1e-12)


# Two trees of one question, six leaves 0, 1, 0 and 1, 1, 0: mean 1/2, sample variance 6 * 1/4 / 5 = 3/10.
# Fails when a tree is taken for a question.
def test_grpo_groups_trees_by_question() -> None:
    one, two, other = small_tree(), small_tree(rewards=(1.0, 1.0, 0.0)), small_tree("other", (1.0, 1.0, 1.0))
    assign_credit([one, other, two], "grpo")
    half = 0.5 / (math.sqrt(0.3) + E)
    assert leaf_advantages(one) == pytest.approx([-half, half, -half], abs=1e-12)
    assert leaf_advantages(two) == pytest.approx([half, half, -half], abs=1e-12)
    assert leaf_advantages(other) == [0.0, 0.0, 0.0]


# The same six leaves. Over the question: -h, h, -h and h, h, -h with h as above. Over each tree: mean 1/3, sample
# variance 1/3, so (-1/3, 2/3, -1/3) / sqrt(1/3) and its mirror image. Fails when the second term starts from the first.
def test_tree_grpo() -> None:
    one, two = small_tree(), small_tree(rewards=(1.0, 1.0, 0.0))
    assign_credit([one, two], "tree_grpo")
    h, std = 0.5 / (math.sqrt(0.3) + E), math.sqrt(1 / 3) + E
    low, high = (-1 / 3) / std, (2 / 3) / std
    assert leaf_advantages(one) == pytest.approx([-h + low, h + high, -h + low], abs=1e-12)
    assert leaf_advantages(two) == pytest.approx([h - low, h - low, -h - high], abs=1e-12)


# A tree of right leaves beside one of wrong leaves: within the trees nothing differs, between them everything. Six
# leaves, mean 1/2, sample variance 3/10. Fails when standardising within the tree takes the first term away.
def test_tree_grpo_compares_trees() -> None:
    right, wrong = small_tree(rewards=(1.0, 1.0, 1.0)), small_tree(rewards=(0.0, 0.0, 0.0))
    assign_credit([right, wrong], "tree_grpo")
    h = 0.5 / (math.sqrt(0.3) + E)
    assert leaf_advantages(right) + leaf_advantages(wrong) == pytest.approx([h] * 3 + [-h] * 3, abs=1e-12)


# Trees of one leaf: the second term is the reward itself. Rewards 0, 1: mean 1/2, std sqrt(1/2).
def test_tree_grpo_of_single_leaves() -> None:
    chains = [TurnTree([1], question_id="q") for _ in range(2)]
    for reward, tree in enumerate(chains):
        tree.set_reward(tree.add_turn(0, [2]), float(reward))
    assign_credit(chains, "tree_grpo")
    h = 0.5 / (math.sqrt(0.5) + E)
    assert [leaf_advantages(tree)[0] for tree in chains] == pytest.approx([-h, h + 1 / (1 + E)], abs=1e-12)


# 0 - (1 + 0)/2 = -1/2, 1 - (0 + 0)/2 = 1. With d twice: b and d 0 - (0 + 1 + 0)/3 = -1/3, c 1 - 0 = 1.
@pytest.mark.parametrize(("copies_of_d", "expected"), [(1, [-1 / 2, 1, -1 / 2]), (2, [-1 / 3, 1, -1 / 3])])
def test_rloo(copies_of_d: int, expected: list[float]) -> None:
    tree = small_tree()
    tree.set_multiplicity(4, copies_of_d)
    assign_credit([tree], "rloo")
    assert leaf_advantages(tree) == pytest.approx(expected, abs=1e-12)


# Questions with rewards 0, 1, 0 and 3, 3, 3: centred -1/3, 2/3, -1/3, 0, 0, 0, on trajectories of 1, 3, 3 action tokens
# each: mean (-1/3 + 3 * 2/3 - 3 * 1/3) / 14 = 1/21, sum of squares 1/9 + 3 * 4/9 + 3 * 1/9 = 16/9, sample variance
# (16/9 - 14/441) / 13. Fails when leaves count alike, the std is taken per question or before the means are subtracted.
def test_reinforce_plus_plus() -> None:
    one, two = small_tree(), small_tree("other", (3.0, 3.0, 3.0))
    assign_credit([one, two], "reinforce++")
    std = math.sqrt((16 / 9 - 14 / 441) / 13 + 1e-8)
    centred = np.array([-1 / 3, 2 / 3, -1 / 3])
    assert leaf_advantages(one) == pytest.approx((centred - 1 / 21) / std, abs=1e-12)
    assert leaf_advantages(two) == pytest.approx([-1 / 21 / std] * 3, abs=1e-12)


# Rewards 0, 1, 0 and k = 2: of the 3 pairs 2 hold c, so E[best] = 2/3 and std = sqrt(2/9).
#   c: every pair with c has best 1: 1 - 2/3 = 1/3.  b: of its 2 pairs one has best 1: 1/2 - 2/3 = -1/6.
# k = 1 is the population-standardised reward; k = 5 > 3 leaves: the only subset is all of them, so no advantage.
@pytest.mark.parametrize(
    ("k", "std", "low", "high"),
    [(1, math.sqrt(2 / 9), -1 / 3, 2 / 3), (2, math.sqrt(2 / 9), -1 / 6, 1 / 3), (5, 0.0, 0.0, 0.0)],
)
def test_pass_at_k(k: int, std: float, low: float, high: float) -> None:
    tree = small_tree()
    assign_credit([tree], "passk", k=k)
    assert leaf_advantages(tree) == pytest.approx(np.array([low, high, low]) / (std + E), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(rewards=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=1, max_size=7), k=st.integers(1, 4))
def test_pass_at_k_equals_enumeration(rewards: list[float], k: int) -> None:
    """The closed form is the average over all k-subsets. Fails when ties or ranks are off by one."""
    tree = TurnTree([1])
    for reward in rewards:
        tree.set_reward(tree.add_turn(0, [2]), reward)
    assign_credit([tree], "passk", k=k)
    subsets = list(combinations(range(len(rewards)), min(k, len(rewards))))
    best = np.array([max(rewards[i] for i in subset) for subset in subsets])
    expected = [
        np.mean([b for b, subset in zip(best, subsets, strict=True) if i in subset]) - best.mean()
        for i in range(len(rewards))
    ]
    assert leaf_advantages(tree) == pytest.approx(np.array(expected) / (best.std() + E), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(tree=trees(credit=False), method=st.sampled_from(METHODS), value=st.sampled_from(VALUES))
def test_multiplicity_is_copies_of_the_leaf(tree: TurnTree, method: str, value: str) -> None:
    """A leaf of multiplicity m counts like m identical siblings, in every method and in every value of at2po."""
    copied = TurnTree(tree.turns[0].observation_ids, question_id=tree.question_id)
    for n, turn in enumerate(tree.turns[1:], start=1):
        copied.add_turn(turn.parent, turn.action_ids, turn.logprobs, turn.observation_ids)
        if not turn.children:
            copied.set_reward(n, turn.reward or 0.0)
    for leaf in tree.leaves:
        turn = tree.turns[leaf]
        for _ in range(turn.multiplicity - 1):
            copied.set_reward(copied.add_turn(turn.parent, turn.action_ids, turn.logprobs), turn.reward or 0.0)
    gold = -np.random.default_rng(len(tree)).random(len(tree))
    tree.gold_logprob, copied.gold_logprob = gold, np.append(gold, np.full(len(copied) - len(tree), np.nan))
    assign_credit([tree], method, value=value)
    assign_credit([copied], method, value=value)
    assert tree.values is not None and copied.values is not None
    assert tree.advantages is not None and copied.advantages is not None
    assert copied.values[: len(tree)] == pytest.approx(tree.values, abs=1e-9)
    assert copied.advantages[: len(tree)] == pytest.approx(tree.advantages, abs=1e-9)


# Fails when a zero std or an empty tree gives nan, inf or rounding noise instead of 0. (gtpo and igpo compare the turns
# of one trajectory too, of which the last is nearest to the outcome.)
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("gtpo", "igpo")])
def test_no_signal_is_exactly_zero(method: str) -> None:
    equal, empty = small_tree("1", (0.1, 0.1, 0.1)), TurnTree([1])
    equal.gold_logprob, empty.gold_logprob = np.zeros(len(equal)), np.zeros(len(empty))
    assign_credit([equal, empty], method)
    for tree in (equal, empty):
        assert tree.advantages is not None and (tree.advantages == 0).all()
        assert tree.values is not None and len(tree.values) == len(tree)


# A question with one leaf: mean 0 and std 1 where the published code has it so, else nothing to compare with. With two
# copies of the leaf it is a group of two. Fails when a lone leaf counts as a group without variance.
@pytest.mark.parametrize(("method", "terms"), [("at2po", 0), ("grpo", 1), ("tree_grpo", 2), ("rloo", 0), ("passk", 0)])
def test_question_with_one_leaf(method: str, terms: int) -> None:
    single, twice = TurnTree([1], question_id="1"), TurnTree([1], question_id="2")
    for tree in (single, twice):
        tree.set_reward(tree.add_turn(0, [2]), 0.7)
    twice.set_multiplicity(1, 2)
    assign_credit([single, twice], method)
    assert single.advantages is not None and twice.advantages is not None
    assert single.advantages[1] == pytest.approx(terms * 0.7 / (1 + E), abs=1e-15)
    assert twice.advantages[1] == 0


def test_a_question_of_two_has_a_baseline() -> None:
    """Fails if reinforce++ leaves out the baseline of small questions: equal rewards then beat the other question's."""
    trees = [TurnTree([1], question_id=question) for question in ("1", "2")]
    for tree, rewards in zip(trees, ((0.0, 1.0), (1.0, 1.0)), strict=True):
        for reward in rewards:
            tree.set_reward(tree.add_turn(0, [2]), reward)
    assign_credit(trees, "reinforce++")
    assert leaf_advantages(trees[1]) == [0.0, 0.0] and leaf_advantages(trees[0])[1] > 0.5


def test_entropies_without_bound() -> None:
    """Fails if siblings are weighed by exp(H) itself, which overflows."""
    tree = TurnTree([1])
    for nll, reward in ((1000.0, 1.0), (1000.0, 0.0), (0.0, 0.0)):
        tree.set_reward(tree.add_turn(0, [2], [-nll]), reward)
    assign_credit([tree], leaf_norm=False)
    assert tree.values is not None and tree.values[0] == 0.5


def test_deep_chain() -> None:
    """Fails when values are computed by recursion (Python's limit is 1,000 levels)."""
    tree = TurnTree([1])
    turn = 0
    for _ in range(3000):
        turn = tree.add_turn(turn, [2], [-1.0])
    tree.set_reward(turn, 1.0)
    assign_credit([tree], leaf_norm=False)
    assert tree.values is not None and (tree.values == 1).all()


def test_leaf_without_reward_is_named() -> None:
    tree = small_tree("who?")
    tree.turns[3].reward = None
    with pytest.raises(ValueError, match=r"'who\?'.*turn 3"):
        assign_credit([small_tree(), tree])


def test_a_discount_reaches_the_outcome_without_rewards_of_turns() -> None:
    """Fails if the discount is left out where no turn has a reward: an outcome three turns away counts 1/4."""
    tree = TurnTree([1])
    last = tree.add_turn(tree.add_turn(tree.add_turn(0, [2]), [2]), [2])
    near = tree.add_turn(0, [3])
    for leaf in (last, near):
        tree.set_reward(leaf, 1.0)
    assign_credit([tree], leaf_norm=False, discount=0.5)
    assert tree.values is not None and tree.values[[last, near]].tolist() == [0.25, 1.0]


@pytest.mark.parametrize(("method", "published"), [("passk", {"k": 4}), ("a2tgpo", {"clip_spread": 0.5})])
def test_defaults(method: str, published: dict[str, float]) -> None:
    """Fails if a default is not the published one."""
    found = []
    for options in ({}, published):
        tree = TurnTree([1], question_id="q")
        for leaf in range(6):
            tree.set_reward(tree.add_turn(tree.add_turn(0, [2], [-0.1]), [2], [-0.2]), float(leaf % 3))
        tree.gold_logprob = np.random.default_rng(0).random(len(tree)) - 1
        assign_credit([tree], method, **options)  # type: ignore[arg-type]
        found.append([tree.advantages, tree.clip_scale])
    np.testing.assert_equal(found[0], found[1])


@pytest.mark.parametrize(
    "arguments", [{"method": "ppo"}, {"value": "max"}, {"advantage": "gae"}, {"method": "passk", "k": 0}]
)
def test_unknown_choices(arguments: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="assign_credit"):
        assign_credit([small_tree()], **arguments)  # type: ignore[arg-type]
