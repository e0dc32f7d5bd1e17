"""`turn_policy_loss` and what it is compared with, on log-probs; and the published loop, from its description."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atpo_kernels import turn_policy_loss
from bench.head.cases import HeadCase
from bench.head.peers import vectorised_turn_loss
from bench.head.problems import CLIP_HIGH, CLIP_LOW, Turns, make_turns

NOTES = {
    "plain": "by autograd, given that turns are of equal length and where they are: less than a trainer has to do",
    "published_loop": "AT2PO's loss as its code is described: a Python loop over turns with one read-back each",
}
Result = tuple[Tensor, Tensor]  # loss (), its gradient by logprob in the shape of logprob


@dataclass(slots=True)
class LogProbs:
    """A batch of log-probs: packed (A,), or (B, T) with turns of equal length between gaps of the same length."""

    logprob: Tensor  # (A,) or (B, T), leaf
    old_logprob: Tensor  # (A,) or (B, T)
    advantages: Tensor  # (turns,) packed; (B, T)
    mask: Tensor | None  # (B, T) float
    offsets: Tensor | None  # (turns + 1,) int32
    turns: Turns


def make_log_probs(case: HeadCase, device: str) -> LogProbs:
    """Draw log-probs by which half of the turns are clipped.

    `case.shape` counts every token: padded batches have gaps beside the turns.
    """
    padded = len(case.shape) == 2
    tokens = case.shape[0] * case.shape[1] // 2 if padded else case.shape[0]
    rng = torch.Generator(device).manual_seed(0)
    logprob = -torch.rand(tokens, generator=rng, device=device)
    turns = make_turns(replace(case, shape=(tokens,), clipped=0.5), logprob.double())
    if not padded:
        return LogProbs(logprob.requires_grad_(), turns.old_logprob, turns.advantages, None, turns.offsets, turns)

    def spread(values: Tensor) -> Tensor:  # (tokens,) -> (B, T)
        pairs = torch.stack([values.view(-1, turns.length), torch.zeros_like(values).view(-1, turns.length)], 1)
        return pairs.reshape(case.shape)

    advantages = spread(turns.advantages.repeat_interleave(turns.length))
    mask = spread(torch.ones_like(logprob))
    old = spread(turns.old_logprob)
    return LogProbs(spread(logprob).requires_grad_(), old, advantages, mask, None, turns)


def make_call(name: str, batch: LogProbs) -> Callable[[], Result]:
    """Make the call that computes loss and gradient by one implementation."""
    function = {"ours": _ours, "plain": _vectorised, "published_loop": _published}[name]

    def call() -> Result:
        loss = function(batch)
        return loss.detach(), torch.autograd.grad(loss, batch.logprob)[0]

    return call


def _ours(batch: LogProbs) -> Tensor:
    packed = batch.offsets is not None
    return turn_policy_loss(
        batch.logprob,
        batch.old_logprob,
        batch.advantages,
        turn_offsets=batch.offsets,
        mask=batch.mask,
        reduction="token-mean" if packed else "seq-mean-token-mean",
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
    ).loss


def _vectorised(batch: LogProbs) -> Tensor:
    turns, logprob, old = batch.turns, batch.logprob, batch.old_logprob
    if batch.offsets is None:
        logprob, old = (x.view(-1, 2, turns.length)[:, 0].reshape(-1) for x in (logprob, old))
    share = torch.full_like(turns.advantages, 1 / logprob.numel())  # rows have equally many action tokens
    return vectorised_turn_loss(logprob, old, turns.advantages, share, turns.length)


def _published(batch: LogProbs) -> Tensor:
    if batch.mask is not None:
        return published_loop(batch.logprob, batch.old_logprob, batch.advantages, batch.mask)
    # it knows padded batches only: turns that lie side by side are told apart by a masked token
    turns = batch.turns

    def gapped(values: Tensor) -> Tensor:  # (A,) -> (1, A + turns)
        return torch.nn.functional.pad(values.view(-1, turns.length), (0, 1)).view(1, -1)

    advantages = turns.advantages.repeat_interleave(turns.length)
    return published_loop(*map(gapped, (batch.logprob, batch.old_logprob, advantages, torch.ones_like(advantages))))


def published_loop(logprob: Tensor, old_logprob: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:  # (B, T) each
    """Compute AT2PO's published turn-level loss literally: a Python loop over rows and over their turns.

    Turns are the contiguous runs of ones of the mask, found token by token on the host; the ratio of a turn is
    exp(sg[mean log-ratio] + logprob - sg[logprob]) with the exponent capped at 10; every turn's mean is read back for
    the metrics. The loss is the mean over rows of the mean over action tokens.
    """
    delta = logprob - old_logprob
    log_ratio = torch.zeros_like(delta)
    means = []
    for row in range(len(mask)):
        start, before = 0, 0.0
        for at, value in enumerate([*mask[row].tolist(), 0.0]):
            if value and not before:
                start = at
            if before and not value:
                mean = delta[row, start:at].detach().mean()
                log_ratio[row, start:at] = mean
                means.append(mean.item())
            before = value
    ratio = (log_ratio + logprob - logprob.detach()).clamp_max(10).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
    return ((loss * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()
