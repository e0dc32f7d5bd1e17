"""`linear_turn_policy_loss` in PyTorch: in chunks of whole turns, with the gradient in the forward."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atpo_kernels.arguments import LossArguments
from atpo_kernels.autograd import attach_gradients
from atpo_kernels.linear_logprob.torch_impl import (
    Head,
    HeadGradients,
    Statistics,
    accumulate_gradients,
    chunk_statistics,
    move_to_front,
    statistics,
)
from atpo_kernels.linear_turn_policy_loss.tiles import WORTH_COPYING, Chunk, plan_chunks
from atpo_kernels.records import HeadInputs, HeadOptions, LinearTurnLoss, LossConfig, TokenWeights
from atpo_kernels.tokens import LossTokens, loss_tokens
from atpo_kernels.turn_policy_loss.torch_impl import evaluate, token_terms


def linear_turn_policy_loss_torch(
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (A,) int64
    bias: Tensor | None,  # (V,)
    options: HeadOptions,
    arguments: LossArguments,  # its logprob and entropy are placeholders
    turn_offsets: Tensor,  # (N+1,)
) -> LinearTurnLoss:
    """Compute `linear_turn_policy_loss` in PyTorch; see there."""
    tokens, config, on_policy = loss_tokens(arguments), arguments.config, arguments.inputs.old_logprob is None
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight, bias)]
    with torch.no_grad():
        head = Head.prepare(weight, bias, options)
        gradients = HeadGradients.zeros(hidden.detach(), head, needs)
        job = _Job(hidden.detach(), head, targets, tokens, config, on_policy, gradients)
        known = job.by_chunks(turn_offsets) if any(needs) else statistics(job.hidden, head, targets)
        result = evaluate(job.with_values(tokens, known), config, False)
    loss = result.loss
    if any(needs):
        summed = HeadInputs(gradients.hidden, gradients.weight, gradients.bias)
        loss = attach_gradients(loss, HeadInputs(hidden, weight, bias), summed, consume=True)
    return LinearTurnLoss(loss, result.metrics, result.grad_logprob, known.logprob, known.entropy)


@dataclass(slots=True)
class _Job:
    """Work of one call, whose gradients are added up chunk by chunk."""

    hidden: Tensor  # (A, D)
    head: Head
    targets: Tensor  # (A,)
    tokens: LossTokens
    config: LossConfig
    on_policy: bool
    gradients: HeadGradients

    def with_values(self, tokens: LossTokens, known: Statistics) -> LossTokens:
        """Return the tokens with the log-probs and entropies that the head computed."""
        old = known.logprob if self.on_policy else tokens.old_logprob
        return replace(tokens, logprob=known.logprob, old_logprob=old, entropy=known.entropy)

    def by_chunks(self, turn_offsets: Tensor) -> Statistics:  # (A,) each
        """Process one chunk after the other; at level sequence all rows are one, since turns may share a trajectory."""
        buffer = self.head.buffer(len(self.targets))
        offsets = turn_offsets.cpu().numpy()
        if self.config.level == "sequence":
            offsets = offsets[[0, -1]]
        result = Statistics(*buffer.new_empty(4, len(self.targets)))
        for chunk in plan_chunks(offsets, max(len(buffer), 1), self.config.level == "token"):
            tokens = self.tokens if self.config.level == "sequence" else _part(self.tokens, chunk)
            known = self.one_pass(tokens, chunk.rows, buffer) if chunk.fits else self.two_pass(tokens, chunk.rows)
            for whole, values in zip(result, known, strict=True):
                whole[chunk.rows] = values
        return result

    def one_pass(self, tokens: LossTokens, rows: slice, buffer: Tensor) -> Statistics:  # (C,) each
        """Compute the logits of whole turns once: statistics, ratio, and from the same logits the gradients."""
        hidden, targets = self.hidden[rows].to(self.head.weight.dtype), self.targets[rows]
        exponential = self.head.logits(hidden, buffer)
        known = chunk_statistics(self.head, exponential, targets)
        terms = token_terms(self.with_values(tokens, known), self.config)
        kept = terms.grad_logprob.nonzero().squeeze(1)
        if terms.grad_entropy is not None or len(kept) >= WORTH_COPYING * len(targets):
            grads = (terms.grad_logprob, terms.grad_entropy)
            self.gradients.add_chunk(rows, hidden, self.head, targets, known, exponential, grads)
        elif len(kept):
            known_there = Statistics(*(x[kept] for x in known))
            hidden, targets, at = hidden[kept], targets[kept], kept + rows.start
            exponential = move_to_front(exponential, kept)
            grads = (terms.grad_logprob[kept], None)
            self.gradients.add_chunk(at, hidden, self.head, targets, known_there, exponential, grads)
        return known

    def two_pass(self, tokens: LossTokens, rows: slice) -> Statistics:  # (C,) each
        """Compute all statistics of any rows first, then their logits again for the gradients."""
        hidden, targets = self.hidden[rows], self.targets[rows]
        known = statistics(hidden, self.head, targets)
        terms = token_terms(self.with_values(tokens, known), self.config)
        part = replace(self.gradients, hidden=None if self.gradients.hidden is None else self.gradients.hidden[rows])
        accumulate_gradients(part, hidden, self.head, targets, known, terms.grad_logprob, terms.grad_entropy)
        return known


def _part(tokens: LossTokens, chunk: Chunk) -> LossTokens:
    """Cut out the tokens of a chunk; turns are counted from its first."""

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
        bounds=None if tokens.bounds is None else (tokens.bounds[0][chunk.rows], tokens.bounds[1][chunk.rows]),
    )
