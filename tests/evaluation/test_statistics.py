"""Statistics against their definitions: enumeration, exact fractions, and coverage of intervals."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import comb

import numpy as np
import pytest

from atpo_fast.evaluation.statistics import (
    estimate,
    majority,
    mcnemar_exact,
    pass_at_k,
    resampled_means,
    sign_flip_test,
    weighted_estimate,
)


@pytest.mark.parametrize(("samples", "correct"), [(5, 0), (5, 1), (6, 3), (4, 4), (7, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(samples: int, correct: int) -> None:
    """Fails for the biased 1 - (1 - c/n)^k, or subsets drawn with replacement."""
    right = [True] * correct + [False] * (samples - correct)
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_outside_its_definition() -> None:
    for arguments in ((3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)):
        with pytest.raises(ValueError, match="not defined"):
            pass_at_k(*arguments)


@pytest.mark.parametrize(
    ("votes", "scores", "expected"),
    [
        (["a", "b", "a"], [1, 0, 1], 1.0),
        (["a", "b", "b"], [1, 0, 0], 0.0),
        (["a", "b"], [1, 0], 0.5),  # a tie is a draw, not the first
        (["b", "a"], [0, 1], 0.5),
        ([None, None, "a"], [0, 0, 1], 1.0),  # no answer is no vote
        ([None, None], [0, 0], 0.0),
        (["a", "b", "c", "c", "b"], [1, 0, 1, 1, 0], 0.5),
    ],
)
def test_majority(votes: list[str | None], scores: list[float], expected: float) -> None:
    assert majority(votes, scores) == expected


def test_mcnemar_is_the_exact_binomial_test() -> None:
    """Fails for the chi-square approximation, a one-sided value, or one above 1."""
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(1, 6) == mcnemar_exact(6, 1) == 0.125  # (1 + 7) * 2 / 128
    for first, second in itertools.product(range(8), repeat=2):
        n = first + second
        chances = [Fraction(comb(n, i), 2**n) for i in range(n + 1)]
        as_extreme = sum(p for i, p in enumerate(chances) if abs(2 * i - n) >= abs(first - second))
        assert mcnemar_exact(first, second) == pytest.approx(float(as_extreme), abs=1e-12)
    assert 0 < mcnemar_exact(400, 900) < 1e-40  # no overflow


def test_sign_flips_agree_with_all_of_them() -> None:
    """Fails for a one-sided value, or for flips that are not fair."""
    differences = np.array([0.5, 0.25, -0.1, 0.8, 0.3, -0.05, 0.0, 0.4])
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=8)]
    exact = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-12)
    assert sign_flip_test(differences) == pytest.approx(exact, abs=0.01)
    assert sign_flip_test(-differences) == pytest.approx(exact, abs=0.01)
    assert sign_flip_test([0.0, 0.0]) == 1.0


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    """Fails for an interval of another level, or one of the values in place of their mean."""
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        found = estimate(generator.random(80) < 0.3, seed=trial)
        covered += found.low <= 0.3 <= found.high
    assert 0.89 <= covered / 200 <= 0.99  # 95 %, three standard errors


def test_the_interval_is_that_of_the_binomial_within_its_width() -> None:
    found = estimate([1.0] * 400 + [0.0] * 600)
    assert found.mean == 0.4
    half = 1.96 * (0.4 * 0.6 / 1000) ** 0.5
    assert (found.low, found.high) == pytest.approx((0.4 - half, 0.4 + half), abs=0.004)


def test_not_one_right_answer_is_no_proof_of_zero() -> None:
    """Fails if an interval is [0, 0] for 0 of 100: the exact upper limit (Clopper and Pearson) is 3.6 %."""
    assert (estimate([0.0] * 100).low, estimate([0.0] * 100).high) == pytest.approx((0, 0.0362), abs=1e-4)
    assert (estimate([1.0] * 100).low, estimate([1.0] * 100).high) == pytest.approx((0.9638, 1), abs=1e-4)
    same = estimate([0.0] * 100, bounds=(-1, 1))
    assert (same.low, same.high) == pytest.approx((-0.0362, 0.0362), abs=1e-4)


def test_weights_are_the_numbers_of_questions() -> None:
    """Fails if sets are averaged with equal weights, or their sizes are resampled too."""
    large, small = [1.0] * 300, [0.0] * 100
    found = weighted_estimate([large, small])
    assert found.mean == 0.75
    assert (found.low, found.high) == pytest.approx((0.743, 0.752), abs=1e-3)  # no set has any spread
    mixed = weighted_estimate([[1.0, 0.0] * 200, small])
    assert mixed.mean == 0.4 and mixed.low < 0.4 < mixed.high


def test_a_large_set_is_resampled_in_parts() -> None:
    """Fails if the parts repeat each other or one is left out."""
    means = resampled_means(np.arange(5000.0))
    assert means.shape == (2000,) and len(set(means.tolist())) > 1990
    with pytest.raises(ValueError, match="no values"):
        resampled_means([])
