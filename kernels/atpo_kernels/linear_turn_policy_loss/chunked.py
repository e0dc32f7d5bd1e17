"""`linear_turn_policy_loss` in chunks of whole turns, with the gradient in the forward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atpo_kernels.linear_logprob.chunked import (
    Head,
    HeadGradients,
    accumulate_gradients,
    chunk_statistics,
    dlogits_of_both,
    dlogits_of_logprob,
    statistics,
)
from atpo_kernels.linear_turn_policy_loss.chunks import Chunk, plan_chunks
from atpo_kernels.records import LinearTurnLoss, LossConfig, TokenWeights
from atpo_kernels.turn_policy_loss.terms import token_terms
from atpo_kernels.turn_policy_loss.tokens import LossTokens
from atpo_kernels.turn_policy_loss.torch_path import turn_policy_loss_torch

_WORTH_COPYING = 0.85  # rows without gradient are left out when fewer than this share of a chunk has one


def linear_turn_policy_loss_chunked(
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (A,) int64
    bias: Tensor | None,  # (V,)
    temperature: float,
    tokens: LossTokens,  # its logprob and entropy are placeholders
    turn_offsets: Tensor,  # (N+1,)
    config: LossConfig,
    on_policy: bool,
) -> LinearTurnLoss:
    """See `linear_turn_policy_loss`."""
    needs = tuple(x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight, bias))
    with torch.no_grad():
        head = Head.prepare(weight, bias, temperature)
        gradients = HeadGradients.zeros(hidden.detach(), head, (needs[0], needs[1], needs[2]))
        job = _Job(hidden.detach(), head, targets, tokens, config, on_policy, gradients)
        if not any(needs):
            logprob, entropy, _ = statistics(job.hidden, head, targets)
        else:
            logprob, entropy = job.by_chunks(turn_offsets)
        result = turn_policy_loss_torch(job.with_values(tokens, logprob, entropy), config, False)
    loss = result.loss
    if any(needs):
        loss = _Scaled.apply(loss, hidden, weight, bias, gradients.hidden, gradients.weight, gradients.bias)
    return LinearTurnLoss(loss, result.metrics, result.coef, logprob, entropy)


@dataclass(slots=True)
class _Job:
    """One call: rows in, gradients added up chunk by chunk."""

    hidden: Tensor  # (A, D)
    head: Head
    targets: Tensor  # (A,)
    tokens: LossTokens
    config: LossConfig
    on_policy: bool
    gradients: HeadGradients

    def with_values(self, tokens: LossTokens, logprob: Tensor, entropy: Tensor) -> LossTokens:
        """The tokens with what the head computed."""
        old = logprob if self.on_policy else tokens.old_logprob
        return replace(tokens, logprob=logprob, old_logprob=old, entropy=entropy)

    def by_chunks(self, turn_offsets: Tensor) -> tuple[Tensor, Tensor]:  # (A,), (A,)
        """Every chunk in turn; at level sequence all rows are one, since every turn may share a trajectory."""
        buffer = self.head.buffer(len(self.targets))
        scratch = [torch.empty_like(buffer) for _ in range(2 if self.config.needs_entropy else 1)]
        logprob, entropy = self.tokens.logprob.clone(), self.tokens.logprob.clone()
        offsets = turn_offsets.cpu().numpy()
        if self.config.level == "sequence":
            offsets = offsets[[0, -1]]
        for chunk in plan_chunks(offsets, max(len(buffer), 1), self.config.level == "token"):
            tokens = self.tokens if self.config.level == "sequence" else _part(self.tokens, chunk)
            if chunk.fits:
                values = self.one_pass(tokens, chunk.rows, buffer, scratch)
            else:
                values = self.two_pass(tokens, chunk.rows)
            logprob[chunk.rows], entropy[chunk.rows] = values
        return logprob, entropy

    def one_pass(
        self, tokens: LossTokens, rows: slice, buffer: Tensor, scratch: list[Tensor]
    ) -> tuple[Tensor, Tensor]:  # (C,), (C,)
        """Logits of whole turns once: statistics, ratio, and from the same logits the gradients."""
        hidden, targets = self.hidden[rows].to(buffer.dtype), self.targets[rows]
        logits = self.head.logits(hidden, buffer)
        kept = scratch[1][: len(logits)].copy_(logits) if self.config.needs_entropy else None
        chunk = chunk_statistics(logits, targets, scratch[0][: len(logits)])
        terms = token_terms(self.with_values(tokens, chunk.logprob, chunk.entropy), self.config)
        if terms.entropy_slope is None:
            self._add_moved_rows(rows, hidden, scratch[0][: len(logits)], chunk.total, terms.coef)
            return chunk.logprob, chunk.entropy
        assert kept is not None
        log2_softmax = kept.sub_(chunk.log2_sum[:, None])
        probs = torch.exp2(log2_softmax, out=scratch[0][: len(logits)])
        dlogits = dlogits_of_both(probs, log2_softmax, targets[:, None], chunk.entropy, terms.coef, terms.entropy_slope)
        self.gradients.add(rows, hidden, dlogits, torch.ones_like(terms.coef), self.head)
        return chunk.logprob, chunk.entropy

    def two_pass(self, tokens: LossTokens, rows: slice) -> tuple[Tensor, Tensor]:  # (C,), (C,)
        """Any rows: all statistics first, then the logits again for the gradients."""
        hidden, targets = self.hidden[rows], self.targets[rows]
        logprob, entropy, log2_sum = statistics(hidden, self.head, targets)
        terms = token_terms(self.with_values(tokens, logprob, entropy), self.config)
        part = replace(self.gradients, hidden=None if self.gradients.hidden is None else self.gradients.hidden[rows])
        accumulate_gradients(part, hidden, self.head, targets, log2_sum, entropy, terms.coef, terms.entropy_slope)
        return logprob, entropy

    def _add_moved_rows(
        self,
        rows: slice,
        hidden: Tensor,  # (C, D)
        exponential: Tensor,  # (C, V) softmax times total, overwritten
        total: Tensor,  # (C,)
        coef: Tensor,  # (C,)
    ) -> None:
        """Gradients through the log-prob; rows without one are left out of the matrix products."""
        moved = coef.nonzero().squeeze(1)
        if len(moved) == 0:
            return
        targets, where = self.targets[rows], rows
        if len(moved) < _WORTH_COPYING * len(coef):
            hidden, exponential, total, coef, targets = (x[moved] for x in (hidden, exponential, total, coef, targets))
            where = moved + rows.start
        dlogits = dlogits_of_logprob(exponential, targets[:, None], total)
        self.gradients.add(where, hidden, dlogits, -coef / total, self.head)


def _part(tokens: LossTokens, chunk: Chunk) -> LossTokens:
    """The tokens of a chunk; turns are counted from its first."""

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[chunk.rows]

    turn = tokens.turn[chunk.rows] - chunk.turns.start
    turns = chunk.turns.stop - chunk.turns.start
    weights = tokens.weights
    return replace(
        tokens,
        logprob=tokens.logprob[chunk.rows],
        old_logprob=tokens.old_logprob[chunk.rows],
        weights=TokenWeights(weights.pos[chunk.rows], weights.neg[chunk.rows], weights.all[chunk.rows]),
        turn=turn,
        num_turns=turns,
        group=None if tokens.group is None else turn,
        num_groups=turns,
        ref_logprob=cut(tokens.ref_logprob),
        rollout_logprob=cut(tokens.rollout_logprob),
        entropy=cut(tokens.entropy),
    )


class _Scaled(torch.autograd.Function):
    """A loss whose gradients by hidden, weight and bias are already known."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        loss: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        by_hidden: Tensor | None,
        by_weight: Tensor | None,
        by_bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(by_hidden, by_weight, by_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = [None if known is None else (known * grad).to(dtype) for known, dtype in pairs]
        return None, *scaled, None, None, None
