"""Sampling: the distribution drawn from, its log-probs, and independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_fast.engines.sampling import SamplingTable, candidate_logprobs, sample, uniforms


def table(rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> SamplingTable:
    return SamplingTable(np.full(rows, temperature), np.full(rows, top_k), np.full(rows, top_p))


def brute_force(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The truncated distribution, token by token: temperature, then top-k, then the smallest set with mass top_p."""
    probs = np.exp(logits / temperature - np.max(logits / temperature))
    order = np.argsort(-probs, kind="stable")[: top_k or None]
    kept: list[int] = []
    mass, total = 0.0, probs[order].sum()
    for token in order:
        if kept and mass >= top_p:
            break
        kept.append(token)
        mass += probs[token] / total
    out = np.zeros(len(probs))
    out[kept] = probs[kept] / probs[kept].sum()
    return out


# A wrong order of the truncations, an off-by-one in the nucleus, log-probs that are not renormalised, a missing id that
# is drawn, or a trainer's log-prob whose normaliser leaves it out, fail here.
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 50]),  # off, one token, some, more than the vocabulary
    top_p=st.sampled_from([1e-6, 0.4, 0.9, 1.0]),  # one token, some, most, off
    missing=st.sampled_from([[], [19], [0, 7, 18, 19]]),
)
def test_distribution_equals_brute_force(
    seed: int, temperature: float, top_k: int, top_p: float, missing: list[int]
) -> None:
    logits = np.random.default_rng(seed).normal(scale=2.0, size=20)
    possible = logits.copy()
    possible[missing] = -np.inf
    expected = brute_force(possible, temperature, top_k, top_p)
    grid = (np.arange(2000) + 0.5) / 2000  # evenly spaced uniforms: frequencies are exact to 1/2000 per token
    given = torch.from_numpy(logits).repeat(len(grid), 1)
    draw = sample(given, grid, table(len(grid), temperature, top_k, top_p), torch.tensor(missing, dtype=torch.int64))
    tokens = draw.tokens.numpy()
    frequencies = np.bincount(tokens, minlength=20) / len(grid)
    np.testing.assert_allclose(frequencies, expected, atol=1.01 / len(grid))
    np.testing.assert_allclose(draw.logprobs.numpy(), np.log(expected[tokens]), atol=1e-12)
    policy = torch.log_softmax(torch.from_numpy(logits) / temperature, -1).numpy()
    np.testing.assert_allclose(draw.policy_logprobs.numpy(), policy[tokens], atol=1e-12)


# Parameters taken from the wrong row, or greedy rows that are truncated or sampled, fail here.
def test_rows_with_different_parameters_do_not_mix() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 30, generator=generator, dtype=torch.float64)
    params = SamplingTable(
        np.array([0.0, 1.0, 0.7, 1.0, 0.0, 2.0]), np.array([0, 0, 5, 0, 3, 2]), np.array([1.0, 1.0, 1.0, 0.5, 0.5, 0.9])
    )
    numbers = np.linspace(0.1, 0.9, 6)
    together = sample(logits, numbers, params)
    for row in range(6):
        alone = sample(logits[row : row + 1], numbers[row : row + 1], params.rows(np.array([row])))
        for joint, single in zip(together, alone, strict=True):
            torch.testing.assert_close(joint[row], single[0], rtol=0, atol=1e-12)
    for row in (0, 4):
        assert together.tokens[row] == logits[row].argmax()
        expected = torch.log_softmax(logits[row], -1).max()
        torch.testing.assert_close(together.logprobs[row], expected)
        torch.testing.assert_close(together.policy_logprobs[row], expected)


def test_missing_ids_are_neither_the_likeliest_nor_candidates() -> None:
    """Fails if a greedy row, or a list of candidates, has an id for which there is no token."""
    logits, missing = torch.tensor([[1.0, 0.5, 9.0, 0.0]]), torch.tensor([2])
    draw = sample(logits.clone(), np.zeros(1), table(1, temperature=0.0), missing)
    assert draw.tokens.item() == 0
    torch.testing.assert_close(draw.policy_logprobs, torch.log_softmax(logits, -1)[:, 0])
    torch.testing.assert_close(draw.logprobs, torch.log_softmax(logits[:, [0, 1, 3]], -1)[:, 0])
    listed = candidate_logprobs(logits.clone(), draw, np.zeros(1), np.array([4]), missing)
    torch.testing.assert_close(listed[0, :3], torch.log_softmax(logits, -1)[0, [0, 1, 3]])
    assert listed.shape == (1, 4) and listed[0, 3].isnan()


# Rounding number x total up to the total would return V (out of range) or a token of probability 0.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_close_to_one_gives_a_possible_token(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]], dtype=dtype)
    number = np.array([1 - 2.0**-53])
    assert sample(logits, number, table(1)).tokens.item() == 1
    assert sample(logits, number, table(1, top_k=3)).tokens.item() in (0, 1)
    assert sample(logits, np.zeros(1), table(1)).tokens.item() == 0


# A hash that overlaps between seeds, or is not uniform, fails here.
def test_uniforms_are_uniform_and_independent() -> None:
    seeds, indices = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(50), indexing="ij")
    numbers = uniforms(seeds.ravel(), indices.ravel()).reshape(200, 50)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert len(np.unique(numbers)) == numbers.size
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 45.3  # chi-square, 19 degrees of freedom, 0.1 % tail at 43.8
    correlations = [
        np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1],  # neighbouring seeds
        np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1],  # neighbouring tokens
    ]
    assert np.abs(correlations).max() < 0.04  # four standard errors
    one = uniforms(np.array([7], dtype=np.uint64), np.array([3]))[0]
    assert one == numbers[7, 3]
