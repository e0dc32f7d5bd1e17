"""From the rewards of leaves to the advantages of turns: the entry point of credit assignment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from atpo_fast.common.choices import AncestorWeight, CreditMethod, SharedTurns, TurnAdvantage, TurnValue
from atpo_fast.credit import trajectory_credit
from atpo_fast.credit.trajectory_credit import Leaves
from atpo_fast.credit.turn_credit import turn_advantages, turn_values
from atpo_fast.credit.turn_returns import Entries, a2tgpo, gtpo, igpo, information_gain
from atpo_fast.tree import Forest, TurnTree, as_forest
from atpo_fast.tree.forest import Floats, Ints, group_sum

METHODS: tuple[str, ...] = get_args(CreditMethod)
VALUES: tuple[str, ...] = get_args(TurnValue)
ADVANTAGES: tuple[str, ...] = get_args(TurnAdvantage)
GAIN_METHODS = ("igpo", "a2tgpo")
"""Methods that need `gold_logprob` on the trees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """The arguments of `assign_credit`, checked."""

    leaf_norm: bool
    value: str
    advantage: str
    k: int
    discount: float | None
    ancestors: str
    clip_spread: float
    shared_turns: str

    def __post_init__(self) -> None:
        for name, given, allowed in (
            ("value", self.value, VALUES),
            ("advantage", self.advantage, ADVANTAGES),
            ("ancestors", self.ancestors, get_args(AncestorWeight)),
            ("shared_turns", self.shared_turns, get_args(SharedTurns)),
        ):
            _check_choice(name, given, allowed)
        if self.k < 1:
            raise ValueError(f"assign_credit: k={self.k} must be at least 1")


def assign_credit(
    trees: Sequence[TurnTree] | Forest,
    method: str = "at2po",
    *,
    leaf_norm: bool = True,
    value: str = "child_softmax",
    advantage: str = "node_value",
    k: int = 4,
    discount: float | None = None,
    ancestors: str = "leaves",
    clip_spread: float = 0.5,
    shared_turns: str = "each",
) -> None:
    """Turn leaf rewards into advantages, in place (docs/design.md#credit).

    Fills `tree.values` and `tree.advantages`, one float per turn. `at2po`, `gtpo`, `igpo` and `a2tgpo` give each turn
    an advantage, the others each trajectory: those also fill `tree.leaf_advantages` (N,), nan except on leaves, and
    `tree.advantages` is then the mean of the leaf advantages below a turn, for display. A leaf counts as often as its
    multiplicity. Trees with the same non-empty `question_id` form one question; all trees given form the batch of
    `reinforce++` and `treepo`. A tree without leaves gets zeros. `a2tgpo` with a `clip_spread` fills `tree.clip_scale`,
    and `shared_turns="once"` `tree.turn_weight`; both are None otherwise.

    Args:
        trees: trees with a reward on every leaf, or their table (`as_forest`), which packing can use again.
        method: one of `METHODS`.
        leaf_norm: at2po: standardise rewards within the tree first.
        value: at2po: one of `VALUES`, `child_softmax`, `child_mean` or `leaf_mean`.
        advantage: at2po: `node_value`, `diff_parent`, `diff_global` or `diff_localglobal`.
        k: passk: size of the set whose best counts.
        discount: factor of a reward that is a turn further away; None: 0.9 for gtpo, else 1. gtpo, igpo and a2tgpo sum
            from each turn on. With the others a trajectory earns the sum from its first turn on: the rewards of its
            turns (`turn_rewards` of the trees), and the outcome with the last.
        ancestors: treepo: weight of an ancestor's comparison, its number of `leaves` or `equal`.
        clip_spread: a2tgpo: by what share a clip range is widened or narrowed at most.
        shared_turns: `each`: a turn counts in each trajectory through it. `once`: it counts once, shared among them.

    Raises:
        ValueError: an unknown choice, k < 1, a leaf without a reward (tree and turn are named), or for `igpo` and
            `a2tgpo` a tree without `gold_logprob`.
    """
    _check_choice("method", method, METHODS)
    options = _Options(
        leaf_norm=leaf_norm,
        value=value,
        advantage=advantage,
        k=k,
        discount=discount,
        ancestors=ancestors,
        clip_spread=clip_spread,
        shared_turns=shared_turns,
    )
    forest = as_forest(trees)
    if not forest.trees:
        return
    reward, turn_rewards = _rewards(forest), _turn_rewards(forest)
    if method in ("gtpo", *GAIN_METHODS):
        _assign_returns(forest, reward, turn_rewards, method, options)
        return _share_turns(forest, shared_turns)
    reward = _discounted(forest, reward, turn_rewards, options.discount)
    if method == "at2po":
        values = turn_values(forest, reward, leaf_norm=leaf_norm, value=value)
        _store(forest, values, turn_advantages(forest, values, advantage=advantage))
    else:
        _assign_leaf_advantages(forest, reward, method, options)
    _share_turns(forest, shared_turns)


def _share_turns(forest: Forest, shared_turns: str) -> None:
    """Let a turn count once, where that is asked for."""
    if shared_turns == "once":
        through = np.maximum(forest.sum_leaves_below(forest.multiplicity), 1.0)
        _store_turns(forest, "turn_weight", 1.0 / through)


def _turn_rewards(forest: Forest) -> Floats:
    """Join the rewards of turns, (N,); 0 for trees without."""
    return np.concatenate([np.zeros(len(t)) if t.turn_rewards is None else t.turn_rewards for t in forest.trees])


def _discounted(forest: Forest, reward: Floats, turn_rewards: Floats, discount: float | None) -> Floats:
    """Sum what each trajectory earns from its first turn on, (S,): rewards of turns, and the outcome at the end."""
    if discount in (None, 1.0) and not turn_rewards.any():
        return reward
    entries = Entries.of(forest, reward, np.zeros(len(forest.trees), dtype=np.int64))
    earned = turn_rewards[entries.turn] + np.where(entries.last, entries.reward, 0.0)
    sums = entries.sum_ahead(earned, 1.0 if discount is None else discount)
    total, acting = reward.copy(), np.diff(forest.path_offsets) > 0
    total[acting] = sums[forest.path_offsets[:-1][acting]]
    return total


def _assign_returns(forest: Forest, reward: Floats, turn_rewards: Floats, method: str, options: _Options) -> None:
    """Give turns their advantages by a method of turn rewards."""
    if method in GAIN_METHODS:
        acting = np.diff(forest.path_offsets) > 0
        reward = reward.copy()
        reward[acting] += turn_rewards[forest.path_turns[forest.path_offsets[1:][acting] - 1]]
    entries = Entries.of(forest, reward, _question_numbers(forest.trees))
    discount = options.discount if options.discount is not None else 0.9 if method == "gtpo" else 1.0
    if method == "gtpo":
        _store(forest, *gtpo(entries, turn_rewards, discount))
        return
    gain = information_gain(forest) + turn_rewards
    values = _mean_by_turn(forest, reward)
    if method == "igpo":
        _store(forest, values, igpo(entries, gain, discount))
    else:
        advantages, scale = a2tgpo(entries, gain, discount, options.clip_spread)
        _store(forest, values, advantages)
        if options.clip_spread:
            _store_turns(forest, "clip_scale", scale)


def _assign_leaf_advantages(forest: Forest, reward: Floats, method: str, options: _Options) -> None:
    """Give trajectories their advantages, and turns the mean of those through them."""
    of_leaf = _trajectory_advantages(forest, reward, method, options)
    per_leaf = np.full(len(forest.parent), np.nan)
    per_leaf[forest.leaves] = of_leaf
    _store(forest, _mean_by_turn(forest, reward), _mean_by_turn(forest, of_leaf), per_leaf)


def _mean_by_turn(forest: Forest, values: Floats) -> Floats:
    """Average (S,) `values` over the trajectories through each turn: (N,), 0 without any."""
    count = np.maximum(forest.sum_leaves_below(forest.multiplicity), 1.0)
    return forest.sum_leaves_below(forest.multiplicity * values) / count


def _check_choice(name: str, given: str, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise ValueError(f"assign_credit: {name}={given!r} must be one of {', '.join(allowed)}")


def _rewards(forest: Forest) -> Floats:
    """Read the leaves' rewards, (S,). Raises ValueError, naming tree and turn, where one is missing or not finite."""
    trees, turns = forest.tree[forest.leaves].tolist(), forest.index[forest.leaves].tolist()
    return np.array([_reward(forest.trees[t], n) for t, n in zip(trees, turns, strict=True)], dtype=np.float64)


def _reward(tree: TurnTree, leaf: int) -> float:
    reward = tree.turns[leaf].reward
    if reward is None or not np.isfinite(reward):
        raise ValueError(
            f"tree {tree.question_id!r}: leaf turn {leaf} has reward {reward}; "
            "call tree.set_reward(turn, reward) with a finite number on every leaf before assign_credit"
        )
    return reward


def _trajectory_advantages(forest: Forest, reward: Floats, method: str, options: _Options) -> Floats:
    """Compute one advantage per leaf, (S,), by a method of trajectories."""
    tree = forest.tree[forest.leaves]
    tokens = group_sum(forest.path_leaf, forest.action_length[forest.path_turns], len(forest.leaves))
    leaves = Leaves(reward, forest.multiplicity, tree, _question_numbers(forest.trees)[tree], tokens)
    methods: dict[str, Callable[[Leaves], Floats]] = {
        "grpo": trajectory_credit.grpo,
        "tree_grpo": trajectory_credit.tree_grpo,
        "rloo": trajectory_credit.rloo,
        "reinforce++": trajectory_credit.reinforce_plus_plus,
        "passk": lambda leaves: trajectory_credit.pass_at_k(leaves, options.k),
        "treepo": lambda leaves: trajectory_credit.treepo(leaves, forest, options.ancestors),
    }
    return methods[method](leaves)


def _question_numbers(trees: Sequence[TurnTree]) -> Ints:
    """Return the number of each tree's question, (trees,). Trees without a question_id share theirs with no other."""
    first: dict[str, int] = {}
    numbers = [first.setdefault(tree.question_id, t) if tree.question_id else t for t, tree in enumerate(trees)]
    return np.array(numbers, dtype=np.int64)


def _store(forest: Forest, values: Floats, advantages: Floats, per_leaf: Floats | None = None) -> None:
    """Write (N,) arrays of the forest to its trees; what another method has left there is cleared."""
    for tree in forest.trees:
        tree.leaf_advantages = tree.clip_scale = tree.turn_weight = None
    _store_turns(forest, "values", values)
    _store_turns(forest, "advantages", advantages)
    if per_leaf is not None:
        _store_turns(forest, "leaf_advantages", per_leaf)


def _store_turns(forest: Forest, name: str, numbers: Floats) -> None:
    """Write an (N,) array of the forest to a field of its trees."""
    bounds = forest.tree_offsets.tolist()
    for tree, start, end in zip(forest.trees, bounds[:-1], bounds[1:], strict=True):
        setattr(tree, name, numbers[start:end].copy())
