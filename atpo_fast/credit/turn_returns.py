"""Credit from rewards of turns: discounted sums along each trajectory (docs/design.md#turn-rewards).

`P` entries: the turns with action tokens of all trajectories, written out (the path table of `Forest`). Statistics run
over entries, so a shared turn counts once for every trajectory through it. A turn's advantage is the mean over those
trajectories.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atpo_fast.credit.standardize import standardize
from atpo_fast.tree.forest import Bools, Floats, Forest, Ints, group_sum


@dataclass(frozen=True, slots=True)
class Entries:
    """The turns of all trajectories written out (P)."""

    forest: Forest
    turn: Ints  # (P,) turn in the forest
    index: Ints  # (P,) index of the turn in its trajectory
    last: Bools  # (P,) whether the trajectory ends with it
    reward: Floats  # (P,) reward of the trajectory
    count: Floats  # (P,) how often the trajectory counts
    question: Ints  # (P,)

    @classmethod
    def of(cls, forest: Forest, reward: Floats, question: Ints) -> Entries:
        """Write out the turns of trajectories with (S,) rewards; `question` (trees,) numbers the trees' questions."""
        leaf, turn, starts = forest.path_leaf, forest.path_turns, forest.path_offsets
        index = np.arange(len(turn)) - starts[leaf]
        return cls(
            forest=forest,
            turn=turn,
            index=index,
            last=index == np.diff(starts)[leaf] - 1,
            reward=reward[leaf],
            count=forest.multiplicity[leaf],
            question=question[forest.tree[turn]],
        )

    def sum_ahead(self, values: Floats, discount: float) -> Floats:
        """Sum (P,) `values` from each entry to the end of its trajectory, later ones discounted: (P,)."""
        total = values.copy()
        ahead = np.flatnonzero(self.last)
        while (ahead := ahead[self.index[ahead] > 0]).size:
            total[ahead - 1] += discount * total[ahead]
            ahead = ahead - 1
        return total

    def mean_by_turn(self, values: Floats) -> Floats:
        """Average (P,) `values` over the trajectories through each turn: (N,), 0 without any."""
        turns = len(self.forest.parent)
        return group_sum(self.turn, self.count * values, turns) / np.maximum(
            group_sum(self.turn, self.count, turns), 1.0
        )


def gtpo(entries: Entries, turn_rewards: Floats, discount: float) -> tuple[Floats, Floats]:
    """Compute returns and advantages of turns: two arrays of (N,) (arXiv:2511.14846).

    The return of a turn is the discounted sum of the rewards from it to the end of the trajectory: `turn_rewards` (N,),
    and the outcome with the last turn. The advantage is the return, standardised over all turns of all trajectories of
    the question (sample std). The paper's text leaves open whether turns are pooled so or compared by their index.
    """
    returns = entries.sum_ahead(turn_rewards[entries.turn] + np.where(entries.last, entries.reward, 0.0), discount)
    advantages = standardize(returns, entries.count, entries.question)
    return entries.mean_by_turn(returns), entries.mean_by_turn(advantages)


def igpo(entries: Entries, gain: Floats, discount: float) -> Floats:
    """Compute advantages of turns from their information gain (N,): (N,) (arXiv:2510.14967).

    The reward of a turn is its gain, that of the last turn the outcome. All of them are standardised together over the
    question (sample std), then summed up to the end of the trajectory, discounted. The released code subtracts the mean
    of the returns at the same token position instead, without a std.
    """
    rewards = np.where(entries.last, entries.reward, gain[entries.turn])
    return entries.mean_by_turn(entries.sum_ahead(standardize(rewards, entries.count, entries.question), discount))


def a2tgpo(entries: Entries, gain: Floats, discount: float, clip_spread: float) -> tuple[Floats, Floats]:
    """Compute advantages and clip scales of turns from their information gain (N,): two of (N,) (arXiv:2605.06200).

    A gain is standardised over the turns of the same index in the question's trajectories, the outcome over the
    question's trajectories; both by the sample std. The advantage of a turn is the discounted sum of these from it to
    the end, the outcome as the last term, divided by the root of the number of terms. The clip range of a turn is
    scaled by 1 + clip_spread * tanh(standardised gain), that of a last turn by 1. Only the abstract was at hand: that
    the outcome is a term of the sum, and tanh, are choices of ours.
    """
    rewards = np.where(entries.last, entries.reward, gain[entries.turn])
    group = np.where(entries.last, -1, entries.index)
    _, of_group = np.unique(np.stack([entries.question, group]), axis=1, return_inverse=True)
    scores = standardize(rewards, entries.count, of_group.reshape(-1))
    terms = entries.sum_ahead(np.ones_like(scores), 1.0)
    advantages = entries.sum_ahead(scores, discount) / np.sqrt(terms)
    scale = 1.0 + clip_spread * np.tanh(np.where(entries.last, 0.0, scores))
    unvisited = group_sum(entries.turn, entries.count, len(gain)) == 0
    return entries.mean_by_turn(advantages), np.where(unvisited, 1.0, entries.mean_by_turn(scale))


def information_gain(forest: Forest) -> Floats:
    """Compute how much each turn raises the probability of the gold answer, (N,): exp(after it) - exp(before it).

    The probability is the geometric mean over the answer's tokens, exp(`gold_logprob`). The gain of the root and of
    leaves is 0: a leaf earns the outcome instead.

    Raises ValueError for a tree without `gold_logprob`, or one that is not finite at a turn with children.
    """
    gold = np.zeros(len(forest.parent))
    bounds = forest.tree_offsets.tolist()
    for tree, name, start, end in zip(forest.trees, forest.names, bounds[:-1], bounds[1:], strict=True):
        if tree.gold_logprob is None or len(tree.gold_logprob) != len(tree):
            raise ValueError(
                f"tree {name} has no gold_logprob for its {len(tree)} turns: the methods of information gain need the "
                "log-prob of the gold answer after every turn with children (atpo_fast.train.information_gain)"
            )
        gold[start:end] = tree.gold_logprob
    inner = np.bincount(forest.parent[forest.parent >= 0], minlength=len(gold)) > 0
    bad = np.flatnonzero(inner & ~np.isfinite(gold))
    if bad.size:
        turn = int(bad[0])
        raise ValueError(
            f"tree {forest.names[forest.tree[turn]]}: gold_logprob of turn {forest.index[turn]} is {gold[turn]}"
        )
    probability = np.exp(np.where(inner, gold, 0.0))
    return np.where(inner & (forest.parent >= 0), probability - probability[forest.parent], 0.0)
