"""Credit per trajectory: one advantage per leaf (docs/design.md#credit)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atpo_fast.credit.standardize import EPSILON, group_mean_std
from atpo_fast.tree.forest import Floats, Ints


@dataclass(frozen=True, slots=True)
class Leaves:
    """The leaves of all trees (S), one after another."""

    reward: Floats  # (S,)
    multiplicity: Floats  # (S,) how often each counts
    tree: Ints  # (S,) number of the leaf's tree
    question: Ints  # (S,) number of its question, of which there may be several trees


def grpo(leaves: Leaves) -> Floats:
    """Standardise rewards over the question's leaves, with the sample std (arXiv:2402.03300): (S,). One leaf gets 0."""
    return _standardize(leaves.reward, leaves.multiplicity, leaves.question)


def tree_grpo(leaves: Leaves) -> Floats:
    """Standardise over the question's leaves and then again over the tree's: (S,) (arXiv:2509.21240, `tree_2norm`).

    A tree with a single leaf keeps the question-level advantage, as in the published code.
    """
    over_question = grpo(leaves)
    over_tree = _standardize(over_question, leaves.multiplicity, leaves.tree)
    _, _, size = group_mean_std(over_question, leaves.multiplicity, leaves.tree, ddof=1)
    return np.where(size > 1, over_tree, over_question)


def rloo(leaves: Leaves) -> Floats:
    """Subtract the mean reward of the question's other leaves: (S,) (arXiv:2402.14740). One leaf gets 0."""
    mean, _, size = group_mean_std(leaves.reward, leaves.multiplicity, leaves.question, ddof=1)
    return (leaves.reward - mean) * size / np.maximum(size - 1.0, 1.0)


def reinforce_plus_plus(leaves: Leaves) -> Floats:
    """Subtract the question's mean, then standardise over all leaves of the batch, with the sample std: (S,).

    REINFORCE++ with baseline (arXiv:2501.03262, section on multiple samples per prompt). The batch is the list of
    trees given to `assign_credit`.
    """
    mean, _, _ = group_mean_std(leaves.reward, leaves.multiplicity, leaves.question, ddof=1)
    return _standardize(leaves.reward - mean, leaves.multiplicity, np.zeros_like(leaves.question))


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


def _standardize(values: Floats, multiplicity: Floats, group: Ints) -> Floats:
    mean, std, _ = group_mean_std(values, multiplicity, group, ddof=1)
    return (values - mean) / (std + EPSILON)


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
