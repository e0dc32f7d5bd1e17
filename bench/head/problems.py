"""Inputs of the benches, and what a computation in float64 from the same rounded inputs gives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from bench.head.cases import HeadCase

CLIP_LOW, CLIP_HIGH = 3e-3, 4e-3
_HIDDEN_ROWS, _WEIGHT_ROWS = 256, 64  # of the gradients that are compared
_TRUTH_BYTES = 1 << 30  # of float64 logits at a time


class Outcome(NamedTuple):
    """Results of one call; None for what it does not compute. Rows are all N, or those that carry loss."""

    logprob: Tensor | None
    entropy: Tensor | None
    hidden_gradient: Tensor | None  # (N, D)
    weight_gradient: Tensor | None  # (V, D)


@dataclass(slots=True)
class Head:
    """An LM head and its targets, with float64 statistics."""

    hidden: Tensor  # (N, D) leaf
    weight: Tensor  # (V, D) leaf
    targets: Tensor  # (N,) int64
    logprob: Tensor  # (N,) float64, as all below
    entropy: Tensor  # (N,)
    log_total: Tensor  # (N,) log of the sum of exp(logits)


@dataclass(slots=True)
class Turns:
    """Turns of equal length over N tokens; whole turns carry loss or do not."""

    length: int
    acting: Tensor  # (K,) bool: whether the turn carries loss
    rows: Tensor  # (A,) int64: tokens of the turns that carry loss
    offsets: Tensor  # (number of turns that carry loss + 1,) int32 over the A rows
    advantages: Tensor  # (K,) float32
    old_logprob: Tensor  # (N,) float32

    def __post_init__(self) -> None:
        assert self.rows.numel() == int(self.acting.sum()) * self.length


@dataclass(slots=True)
class Problem:
    """The inputs that a timed call reads."""

    head: Head
    upstream: Tensor  # (2, N) float32 gradients by log-prob and by entropy
    turns: Turns


@lru_cache(maxsize=1)
def make_head(shape: tuple[int, int, int], dtype: str, peaked: bool, device: str) -> Head:
    """Draw a head: the same numbers in every run on one kind of device.

    Random: logits of standard deviation 1. Peaked: background logits of standard deviation 2, and one token of every
    row (the target in 4 rows of 5) above them by 8 to 24, so that its probability goes from next to 0 to next to 1.
    """
    rows, width, vocab = shape
    rng = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, device=device)

    weight = (normal(vocab, width) / width**0.5).to(getattr(torch, dtype))
    targets = torch.randint(vocab, (rows,), generator=rng, device=device)
    hidden = normal(rows, width)
    if peaked:
        other = torch.randint(vocab, (rows,), generator=rng, device=device)
        likely = torch.where(torch.rand(rows, generator=rng, device=device) < 0.8, targets, other)
        height = 8 + 16 * torch.rand(rows, generator=rng, device=device)
        hidden = 2 * hidden + height[:, None] * weight[likely].float()  # rows of the weight have length 1
    hidden = hidden.to(weight.dtype)
    return Head(hidden.requires_grad_(), weight.requires_grad_(), targets, *_statistics(hidden, weight, targets))


def make_problem(case: HeadCase, device: str) -> Problem:
    """Draw the inputs of a case on a device."""
    head = make_head(case.shape, case.dtype, case.peaked, device)  # type: ignore[arg-type]
    rng = torch.Generator(device).manual_seed(1)
    upstream = torch.randn(2, case.shape[0], generator=rng, device=device)
    return Problem(head, upstream, make_turns(case, head.logprob))


def make_turns(case: HeadCase, logprob: Tensor) -> Turns:  # logprob (N,) float64
    """Draw turns whose mean log-ratio lies well inside the clip range, or well outside on the side that clips."""
    tokens, device = logprob.numel(), logprob.device
    rng = torch.Generator(device).manual_seed(2)
    turns = tokens // case.turn_length
    acting = torch.rand(turns, generator=rng, device=device).argsort() < round(case.loss_tokens * turns)
    advantages = 0.5 + torch.rand(turns, generator=rng, device=device)
    advantages *= torch.where(torch.rand(turns, generator=rng, device=device) < 0.5, -1, 1)
    rank = torch.where(acting, torch.rand(turns, generator=rng, device=device), 2).argsort().argsort()
    clipped = rank < round(case.clipped * int(acting.sum()))
    inside = (torch.rand(turns, generator=rng, device=device) - 0.5) * 2e-3
    mean = torch.where(clipped, 0.05 * advantages.sign(), inside)
    noise = 0.02 * torch.randn(turns, case.turn_length, generator=rng, device=device)
    ratio = mean[:, None] + noise - noise.mean(1, keepdim=True)
    return Turns(
        length=case.turn_length,
        acting=acting,
        rows=acting.repeat_interleave(case.turn_length).nonzero().squeeze(1),
        offsets=torch.arange(int(acting.sum()) + 1, device=device, dtype=torch.int32) * case.turn_length,
        advantages=advantages,
        old_logprob=(logprob - ratio.reshape(-1)).float(),
    )


@torch.no_grad()
def errors(case: HeadCase, problem: Problem, outcome: Outcome) -> dict[str, dict[str, float]]:
    """Return the largest and the mean error of each result against float64.

    Errors of log-probs and entropies are absolute, in nats. Those of gradients are taken on 256 rows of hidden and 64
    of the vocabulary, relative to the largest and to the mean true value.
    """
    head, result = problem.head, {}
    for name, ours, truth in (
        ("logprob", outcome.logprob, head.logprob),
        ("entropy", outcome.entropy, head.entropy),
    ):
        if ours is not None:
            rows = problem.turns.rows
            kept = ours.detach() if len(ours) == len(rows) else ours.detach()[rows]
            gap = (kept.double() - truth[rows]).abs()
            result[name] = {"max": float(gap.max()), "mean": float(gap.mean())}
    if outcome.hidden_gradient is not None or outcome.weight_gradient is not None:
        by_logprob, by_entropy = _upstream(case, problem)
        at, by_hidden, words, by_weight = _gradients(head, by_logprob, by_entropy)
        for name, ours, where, truth in (
            ("hidden_gradient", outcome.hidden_gradient, at, by_hidden),
            ("weight_gradient", outcome.weight_gradient, words, by_weight),
        ):
            if ours is not None:
                gap, size = (ours[where].double() - truth).abs(), truth.abs()
                result[name] = {"max": float(gap.max() / size.max()), "mean": float(gap.mean() / size.mean())}
    return result


def _upstream(case: HeadCase, problem: Problem) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    """Compute d loss / d log-prob and d loss / d entropy, in float64."""
    none = torch.zeros_like(problem.head.logprob)
    if case.operator == "linear_turn_policy_loss":
        return turn_coefficients(problem.turns, problem.head.logprob), none
    grad_logprob, grad_entropy = problem.upstream.double()
    return grad_logprob, grad_entropy if case.mode == "entropy_gradient" else none


def turn_coefficients(turns: Turns, logprob: Tensor) -> Tensor:  # (N,) -> (N,)
    """Compute d loss / d log-prob of the token mean of the turn-clipped loss."""
    ratio = (logprob - turns.old_logprob).view(-1, turns.length).mean(1).exp()
    advantages = turns.advantages.to(logprob.dtype)
    clipped = torch.where(advantages > 0, ratio > 1 + CLIP_HIGH, ratio < 1 - CLIP_LOW)
    gradient = torch.where(clipped | ~turns.acting, 0, -advantages * ratio / max(turns.rows.numel(), 1))
    return gradient.repeat_interleave(turns.length)


@torch.no_grad()
def _statistics(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (N,) each
    """Compute log-prob, entropy and log of the sum of exponentials, in float64 chunks."""
    weight = weight.double()
    parts = []
    for rows in torch.arange(len(targets), device=targets.device).split(max(1, _TRUTH_BYTES // (8 * len(weight)))):
        logits = hidden[rows].double() @ weight.t()
        log_total = logits.logsumexp(1)
        target = logits.gather(1, targets[rows, None]).squeeze(1)
        logits -= log_total[:, None]
        entropy = -(logits.exp() * logits).sum(1)
        parts.append(torch.stack([target - log_total, entropy, log_total]))
    return tuple(torch.cat(parts, 1))  # type: ignore[return-value]


def _gradients(
    head: Head,
    by_logprob: Tensor,  # (N,)
    by_entropy: Tensor,  # (N,)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (R,), (R, D), (W,), (W, D)
    """Choose rows of hidden and of the vocabulary (half of them targets) and compute their gradients."""
    rng = torch.Generator().manual_seed(3)
    rows, vocab = len(head.targets), len(head.weight)
    at = torch.randperm(rows, generator=rng)[:_HIDDEN_ROWS].to(head.targets.device)
    words = torch.randperm(vocab, generator=rng)[: _WEIGHT_ROWS // 2].to(at.device)
    words = torch.cat([words, head.targets[at[: _WEIGHT_ROWS // 2]]]).unique()

    def dlogits(rows: Tensor | slice, columns: Tensor | slice) -> Tensor:
        logarithm = hidden[rows] @ weight[columns].t() - head.log_total[rows, None]
        index = torch.arange(vocab, device=at.device)[columns]
        onehot = (head.targets[rows, None] == index).double()
        probability = logarithm.exp()
        through_entropy = by_entropy[rows, None] * probability * (logarithm + head.entropy[rows, None])
        return by_logprob[rows, None] * (onehot - probability) - through_entropy

    hidden, weight = head.hidden.double(), head.weight.double()
    everything = slice(None)
    return at, dlogits(at, everything) @ weight, words, dlogits(everything, words).t() @ hidden
