"""Statistics of evaluations: bootstrap intervals, pass@k, majority votes, and paired tests. Plain arrays in and out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2000
FLIPS = 10_000
_AT_ONCE = 1 << 22  # numbers drawn at a time, which bounds the memory


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with the ends of its interval at `LEVEL`."""

    mean: float
    low: float
    high: float


def resampled_means(values: ArrayLike, seed: int = 0) -> Floats:
    """Return the means of `RESAMPLES` bootstrap samples of `values` (n,): (RESAMPLES,).

    Raises ValueError when there are no values.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size == 0:
        raise ValueError("the mean of no values cannot be estimated")
    generator = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // numbers.size)
    parts = [
        numbers[generator.integers(numbers.size, size=(min(rows, RESAMPLES - done), numbers.size))].mean(axis=1)
        for done in range(0, RESAMPLES, rows)
    ]
    return np.concatenate(parts)


def estimate(values: ArrayLike, seed: int = 0, bounds: tuple[float, float] = (0.0, 1.0)) -> Estimate:
    """Return the mean of `values` (n,), all within `bounds`, with its percentile bootstrap interval."""
    return weighted_estimate([values], seed, bounds)


def weighted_estimate(sets: Sequence[ArrayLike], seed: int = 0, bounds: tuple[float, float] = (0.0, 1.0)) -> Estimate:
    """Return the mean over the values of all sets, each set weighted by its size, with its bootstrap interval.

    The sets are resampled one by one, since their sizes are given and not drawn. Where all resamples have the same mean
    (not one answer is right, say), the bootstrap knows no interval: it is then that within which at most the share
    1 - (0.025)^(1/n) of all questions has other values, the exact bound for n that are equal.
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in sets]
    total = sum(array.size for array in arrays)
    means = np.asarray(sum(array.size / total * resampled_means(array, seed + i) for i, array in enumerate(arrays)))
    mean = float(np.concatenate(arrays).mean())
    tail = (1 - LEVEL) / 2
    if np.ptp(means) < 1e-12:
        share = 1 - tail ** (1 / total)
        return Estimate(mean, mean - share * (mean - bounds[0]), mean + share * (bounds[1] - mean))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(mean, float(low), float(high))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the probability that one of k samples is correct, drawn without replacement from those at hand.

    It is the unbiased estimate 1 - C(n - c, k) / C(n, k) (Chen et al., arXiv:2107.03374).

    Raises ValueError unless 0 <= correct <= samples and 1 <= k <= samples.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples, {correct} of them correct, is not defined")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(votes: Sequence[Hashable | None], scores: Sequence[float]) -> float:
    """Return the score of the answer that most samples gave; None is no vote.

    Among answers with equally many votes one is chosen at random: the score is the mean of theirs. Without any vote it
    is 0.

    Args:
        votes: (n,) what each sample answered, equal for equal answers.
        scores: (n,) score of each sample.
    """
    given: dict[Hashable, list[float]] = defaultdict(list)
    for vote, score in zip(votes, scores, strict=True):
        if vote is not None:
            given[vote].append(score)
    most = max(map(len, given.values()), default=0)
    means = [sum(found) / most for found in given.values() if len(found) == most]
    return sum(means) / len(means) if means else 0.0


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test, for so many questions that only one of two models got.

    It is that of the binomial test with probability 1/2, computed in whole numbers.
    """
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def sign_flip_test(differences: ArrayLike, seed: int = 0) -> float:
    """Return the two-sided p-value of a paired randomisation test of differences (n,).

    Their signs are drawn `FLIPS` times. The observed signs count as one of the draws, so the value is never 0.
    """
    given = np.asarray(differences, dtype=np.float64)
    given = given[given != 0]
    if given.size == 0:
        return 1.0
    observed = abs(given.sum()) * (1 - 1e-12)  # equal sums in another order count as equal
    generator = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // given.size)
    extreme = 0
    for done in range(0, FLIPS, rows):
        signs = generator.integers(2, size=(min(rows, FLIPS - done), given.size)) * 2 - 1
        extreme += int((np.abs(signs @ given) >= observed).sum())
    return (1 + extreme) / (1 + FLIPS)
