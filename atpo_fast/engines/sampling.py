"""Draw tokens from logits, each request with its own parameters and its own random numbers (docs/design.md#engines).

A token is drawn by inverting the cumulative distribution at one uniform number that is a hash of (request seed, index
of the token in the completion). The draw therefore does not depend on what else is in the batch, or on its order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class Draw(NamedTuple):
    """Sampled tokens; every field has shape (R,). See `Completion` for the two log-probs."""

    tokens: Tensor  # int64
    logprobs: Tensor  # dtype of the logits
    policy_logprobs: Tensor  # dtype of the logits


class SamplingTable(NamedTuple):
    """Sampling parameters of N requests; every field has shape (N,)."""

    temperature: NDArray[np.float64]  # 0 is greedy
    top_k: NDArray[np.int64]  # 0 is off
    top_p: NDArray[np.float64]  # 1 is off

    def rows(self, index: NDArray[np.int64]) -> SamplingTable:
        """Select the parameters of some of the requests."""
        return SamplingTable(self.temperature[index], self.top_k[index], self.top_p[index])


def uniforms(seeds: NDArray[np.uint64], indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Hash (seed, token index) to one number in [0, 1): splitmix64, the same on every machine. Shapes (R,)."""
    with np.errstate(over="ignore"):
        state = _splitmix(seeds) + (indices.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        bits = _splitmix(state)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = values + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    return mixed ^ (mixed >> np.uint64(31))


def sample(
    logits: Tensor,  # (R, V) float32 or float64
    uniform: NDArray[np.float64],  # (R,) in [0, 1)
    params: SamplingTable,  # parameters of the same R rows
    missing: Tensor | None = None,  # (m,) ids that are never drawn
) -> Draw:
    """Draw one token per row.

    Order of truncation: temperature, then the `missing` ids, then top-k, then top-p on what is left (at least one token
    stays). The normaliser of `policy_logprobs` runs over all V ids, the missing ones too, as the trainer's does. Greedy
    rows (temperature 0) take the arg-max and report `policy_logprobs` at temperature 1. The logits of missing ids are
    overwritten with minus infinity, which spares a copy of all the others.
    """
    greedy = params.temperature == 0
    logp = torch.log_softmax(_scale(logits, np.where(greedy, 1.0, params.temperature)), dim=-1)
    _hide(logp, missing)
    _hide(logits, missing)
    likeliest = logits.argmax(dim=-1) if greedy.any() else None
    if greedy.all() and likeliest is not None:
        return _untruncated(likeliest, logp, missing)
    numbers = torch.from_numpy(uniform).to(logits)
    tokens = _invert_cdf(logp.exp(), numbers)
    if likeliest is not None:
        tokens = torch.where(torch.from_numpy(greedy).to(logits.device), likeliest, tokens)
    draw = _untruncated(tokens, logp, missing)
    truncated = ((params.top_k > 0) | (params.top_p < 1)) & ~greedy
    if not truncated.any():
        return draw
    index = np.flatnonzero(truncated)
    rows = torch.from_numpy(index).to(logits.device)
    drawn, policy = draw.logprobs.clone(), draw.policy_logprobs
    tokens[rows], drawn[rows] = _sample_truncated(logp[rows], numbers[rows], params.rows(index))
    policy[rows] = _pick(logp[rows], tokens[rows])
    return Draw(tokens, drawn, policy)


def _hide(values: Tensor, missing: Tensor | None) -> None:
    """Overwrite the columns of the missing ids in (R, V) values with minus infinity."""
    if missing is not None and len(missing):
        values.index_fill_(1, missing, float("-inf"))


def _untruncated(tokens: Tensor, logp: Tensor, missing: Tensor | None) -> Draw:
    """Look up both log-probs of (R,) tokens in (R, V) `logp`; its normaliser has the missing ids, which are hidden."""
    policy = _pick(logp, tokens)
    some = missing is not None and len(missing)
    return Draw(tokens, policy - logp.logsumexp(dim=-1) if some else policy, policy)


def candidate_logprobs(
    logits: Tensor,  # (R, V) that the tokens were drawn from
    draw: Draw,
    temperature: NDArray[np.float64],  # (R,) 0 is greedy
    counts: NDArray[np.int64],  # (R,) number of candidates of each row, none of them 0
    missing: Tensor | None = None,  # (m,) ids that are no candidates
) -> Tensor:
    """Look up the log-probs of each row's likeliest candidates and of its drawn token.

    Returns (R, K+1), K the largest count: the candidates in the order of their likelihood, then the drawn token. NaN
    stands from a row's count on, and for a drawn token that is among the candidates. They are those of the distribution
    of `Draw.policy_logprobs`, whose normaliser they share. The logits of missing ids are overwritten.
    """
    _hide(logits, missing)
    count = min(int(counts.max()), logits.shape[1] - (0 if missing is None else len(missing)))
    scaled, ids = torch.topk(logits, count, dim=-1)
    drawn = draw.tokens[:, None]
    heat = torch.from_numpy(np.where(temperature == 0, 1.0, temperature)).to(logits)[:, None]
    normaliser = logits.gather(1, drawn) / heat - draw.policy_logprobs[:, None]
    wanted = torch.arange(count, device=logits.device) < torch.from_numpy(counts).to(logits.device)[:, None]
    known = ((ids == drawn) & wanted).any(dim=-1, keepdim=True)
    candidates = torch.where(wanted, scaled / heat - normaliser, torch.nan)
    return torch.cat([candidates, torch.where(known, torch.nan, draw.policy_logprobs[:, None])], dim=-1)


def _scale(logits: Tensor, temperature: NDArray[np.float64]) -> Tensor:
    if (temperature == 1.0).all():
        return logits
    return logits / torch.from_numpy(temperature).to(logits)[:, None]


def _pick(logp: Tensor, tokens: Tensor) -> Tensor:
    return logp.gather(1, tokens[:, None])[:, 0]


def _invert_cdf(
    weights: Tensor,  # (R, V) not negative, some positive in each row
    numbers: Tensor,  # (R,) in [0, 1)
) -> Tensor:
    """Find the first index whose cumulative weight exceeds `number` x total, (R,); never one of weight 0."""
    cdf = weights.cumsum(dim=-1)
    total = cdf[:, -1]
    below = torch.nextafter(total, torch.zeros_like(total))  # rounding may lift number x total up to the total
    return torch.searchsorted(cdf, torch.minimum(numbers * total, below)[:, None], right=True)[:, 0]


def _sample_truncated(
    logp: Tensor,  # (R, V) log-probs at the row's temperature
    numbers: Tensor,  # (R,)
    params: SamplingTable,
) -> tuple[Tensor, Tensor]:
    """Draw (R,) tokens from the truncated distribution, and return them with their (R,) log-probs under it."""
    weights, tokens = truncate(logp, params)
    drawn = tokens.gather(1, _invert_cdf(weights, numbers)[:, None])
    logprobs = logp.gather(1, drawn) - weights.sum(dim=-1, keepdim=True).log()
    return drawn[:, 0], logprobs[:, 0]


def truncate(
    logp: Tensor,  # (R, V) log-probs at the row's temperature
    params: SamplingTable,
) -> tuple[Tensor, Tensor]:
    """Cut a distribution to top-k and then to top-p.

    Returns (R, K) probabilities in descending order, 0 where a token is cut, and (R, K) the ids of the tokens; K is
    the largest top-k. The kept probabilities are those of the whole distribution: they sum to what was kept of it.
    """
    vocabulary = logp.shape[1]
    top_k = np.where(params.top_k > 0, np.minimum(params.top_k, vocabulary), vocabulary)
    ordered, order = torch.topk(logp, int(top_k.max()), dim=-1)
    ranks = torch.arange(ordered.shape[1], device=logp.device)
    keep = ranks < torch.from_numpy(top_k).to(logp.device)[:, None]
    weights = torch.where(keep, ordered.exp(), 0.0)
    mass = weights.cumsum(dim=-1)
    before = (mass - weights) / mass[:, -1:]
    top_p = torch.from_numpy(params.top_p).to(logp)[:, None]
    return torch.where((before < top_p) | (ranks == 0), weights, 0.0), order
