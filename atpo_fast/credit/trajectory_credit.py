"""Credit per trajectory: one advantage per leaf (docs/design.md#credit)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atpo_fast.credit.standardize import EPSILON, group_mean_std, standardize, whiten
from atpo_fast.tree.forest import Floats, Forest, Ints


@dataclass(frozen=True, slots=True)
class Leaves:
    """The leaves of all trees (S), one after another."""

    reward: Floats  # (S,)
    multiplicity: Floats  # (S,) how often each counts
    tree: Ints  # (S,) number of the leaf's tree
    question: Ints  # (S,) number of its question, of which there may be several trees
    tokens: Floats  # (S,) action tokens of its trajectory


def grpo(leaves: Leaves) -> Floats:
    """Standardise rewards over the question's leaves, with the sample std: (S,) (arXiv:2402.03300).

    A question with one leaf counts with mean 0 and std 1, as in the published code: its advantage is R / (1 + 1e-6).
    """
    return standardize(leaves.reward, leaves.multiplicity, leaves.question)


def tree_grpo(leaves: Leaves) -> Floats:
    """Add the reward standardised over the question's leaves and that over its own tree's: (S,) (arXiv:2509.21240).

    Both terms start from the raw reward and take the sample std. A tree with one leaf counts in its second term with
    mean 0 and std 1, that is R / (1 + 1e-6).
    """
    return grpo(leaves) + standardize(leaves.reward, leaves.multiplicity, leaves.tree)


def rloo(leaves: Leaves) -> Floats:
    """Subtract the mean reward of the question's other leaves: (S,) (arXiv:2402.14740). One leaf gets 0."""
    mean, _, size = group_mean_std(leaves.reward, leaves.multiplicity, leaves.question, ddof=1)
    return (leaves.reward - mean) * size / np.maximum(size - 1.0, 1.0)


def reinforce_plus_plus(leaves: Leaves) -> Floats:
    """Subtract the question's mean, then whiten over all action tokens of the batch: (S,).

    REINFORCE++ with baseline (arXiv:2501.03262), as verl computes it: every action token carries the centred reward of
    its trajectory, and A = (x - mean) / sqrt(var + 1e-8) with the sample variance over tokens, so a long trajectory
    weighs more in mean and variance than a short one. The baseline of a question with one leaf is 0. The batch is the
    list of trees given to `assign_credit`.
    """
    mean, _, size = group_mean_std(leaves.reward, leaves.multiplicity, leaves.question, ddof=1)
    return whiten(leaves.reward - np.where(size > 1, mean, 0.0), leaves.multiplicity * leaves.tokens)


def treepo(leaves: Leaves, forest: Forest, ancestors: str) -> Floats:
    """Compare each leaf with the leaves below each of its ancestors, then whiten over all action tokens: (S,).

    TreePO (arXiv:2508.17445): A = sum of w_g (R - mean_g) over the ancestors g of the leaf, divided by the sum of w_g.
    The root stands for all leaves of the question, whichever tree they are in. Other ancestors with a single leaf below
    do not count. `ancestors` says what w_g is: the number of `leaves` below g, or `equal` weights.
    """
    equal, size = ancestors == "equal", leaves.multiplicity
    mean, _, size_of_question = group_mean_std(leaves.reward, size, leaves.question, ddof=1)
    centred = leaves.reward - mean  # exactly 0 where all are equal, and so are the means below
    below = forest.sum_leaves_below(size)
    mean_below = forest.sum_leaves_below(size * centred) / np.maximum(below, 1.0)
    counts = (below > 1) & (forest.parent >= 0)
    weight = np.where(counts, 1.0 if equal else below, 0.0)
    weighted = weight * mean_below
    for level in forest.levels[1:]:
        above = forest.parent[level]
        weight[level] += weight[above]
        weighted[level] += weighted[above]
    parent = forest.parent[forest.leaves]
    whole = 1.0 if equal else size_of_question  # the question's own mean is 0 here
    return whiten(centred - weighted[parent] / (weight[parent] + whole), size * leaves.tokens)


def pass_at_k(leaves: Leaves, k: int) -> Floats:
    """Credit each leaf for the best reward of k leaves of its question: (S,) (arXiv:2508.10751, section 2.3).

    A = (E[best of k | leaf among them] - E[best of k]) / (std[best of k] + 1e-6) over all k-subsets of the question's
    leaves; for 0/1 rewards these are the paper's closed forms. Fewer than k leaves: all of them are the subset.
    """
    advantage = np.zeros(len(leaves.reward))
    for question in np.unique(leaves.question):
        member = np.flatnonzero(leaves.question == question)
        advantage[member] = _pass_at_k_of_group(leaves.reward[member], leaves.multiplicity[member].astype(np.int64), k)
    return advantage


def _pass_at_k_of_group(reward: Floats, multiplicity: Ints, k: int) -> Floats:
    """Compute the advantages of the s distinct leaves of one question: (s,)."""
    source = np.repeat(np.arange(len(reward)), multiplicity)
    source = source[np.argsort(reward[source], kind="stable")]
    ordered = reward[source]  # (n,) ascending
    n = len(ordered)
    k = min(k, n)
    rank = np.arange(n)
    best = _subset_share(rank, n, k)  # P(the best of a random k-subset is rank j)
    mean = float(best @ ordered)
    std = float(np.sqrt(best @ (ordered - mean) ** 2))
    # with leaf i in the subset, k - 1 others are drawn from n - 1: the best is i itself or a higher rank j > i
    others = _subset_share(rank - 1, n - 1, k - 1)  # P(the best of the others is j), for j > i
    above = np.append(np.cumsum((others * ordered)[::-1])[::-1][1:], 0.0)
    share_above = np.append(np.cumsum(others[::-1])[::-1][1:], 0.0)
    given = above + (1.0 - share_above) * ordered
    result = np.zeros(len(reward))
    result[source] = (given - mean) / (std + EPSILON)
    return result


def _subset_share(below: Ints, n: int, k: int) -> Floats:
    """Compute C(below, k-1) / C(n, k), (n,): the share of k-subsets of n whose best has `below` members under it.

    It is 0 for k = 0.
    """
    if k == 0:
        return np.zeros(len(below))
    usable = below >= k - 1
    share = np.where(usable, k / max(n, 1), 0.0)
    for step in range(k - 1):
        share = share * np.where(usable, (below - step) / max(n - 1 - step, 1), 0.0)
    return share
