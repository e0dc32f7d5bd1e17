"""`linear_turn_policy_loss` on Triton kernels: gradient in the forward, logits of a chunk computed once.

Per chunk of whole turns: (1) one product gives the softmax statistics and leaves the exponentials in a scratch buffer;
(2) the turns' losses and coefficients; (3) d loss / d logits in place of the exponentials, rows without gradient left
out; (4) two products give the gradients of hidden and weight. The host has to know how many rows are left to launch
(4): it reads their number while the device is busy with (3), so that the device never waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from atpo_kernels.linear_logprob.triton import Gradients, rows_per_chunk
from atpo_kernels.linear_logprob.triton_head import Scratch, Statistics, TritonHead
from atpo_kernels.linear_turn_policy_loss.chunks import Chunk, plan_chunks
from atpo_kernels.linear_turn_policy_loss.known_gradients import with_gradients
from atpo_kernels.linear_turn_policy_loss.triton_gradient import KeptRows, softmax_gradient, variants
from atpo_kernels.records import HeadInputs, LinearTurnLoss, LossConfig, RatioLevel
from atpo_kernels.turn_policy_loss.layout import LossArguments
from atpo_kernels.turn_policy_loss.triton import PackedLoss

__all__ = ["linear_turn_policy_loss", "variants"]


@dataclass(slots=True)
class _Job:
    """One call: rows in, gradients added up chunk by chunk."""

    head: TritonHead
    loss: PackedLoss
    known: Statistics  # (A,) each
    gradients: Gradients
    scratch: Scratch
    kept: KeptRows | None  # None: every row is taken
    unit: Tensor | None  # () see `_unit`

    def one_pass(self, chunk: Chunk) -> None:
        """Logits of whole turns once."""
        start, rows = chunk.rows.start, chunk.rows.stop - chunk.rows.start
        self.head.statistics(self.known, start, rows, self.scratch)
        up = self.upstream(chunk)
        hidden = self.head.hidden[chunk.rows]
        if self.kept is None:
            softmax_gradient(self.head, self.scratch, self.known, up, start, rows)
            self.gradients.add(self.scratch.dlogits[:rows], hidden, chunk.rows)
            return
        self.kept.find(up[0], start, rows)
        softmax_gradient(self.head, self.scratch, self.known, up, start, self.kept)
        count = self.kept.wait()
        if count == rows:
            self.gradients.add(self.scratch.dlogits[:rows], hidden, chunk.rows)
        elif count:
            index = self.kept.index[:count].long()
            self.gradients.add(self.scratch.dlogits[:count], hidden.index_select(0, index), index + start)

    def two_pass(self, chunk: Chunk) -> None:
        """Turns of any length: all statistics first, then the logits again for the gradients."""
        start, rows = chunk.rows.start, chunk.rows.stop - chunk.rows.start
        self.head.statistics(self.known, start, rows)
        up = self.upstream(chunk)
        index = torch.arange(start, start + rows, device=self.head.hidden.device)
        if self.kept is not None:
            self.kept.find(up[0], start, rows)
            index = self.kept.index[: self.kept.wait()].long() + start
        for at in index.split(len(self.scratch.dlogits)) if index.numel() else ():
            head = self.head.take(at)
            known = Statistics(*(x[at] for x in self.known))
            up_entropy = None if up[1] is None else up[1][at]
            dlogits = head.dlogits(self.scratch.dlogits, known, up[0][at], up_entropy, 0, len(at))
            self.gradients.add(dlogits, head.hidden, at)

    def upstream(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:  # (A,), (A,)
        """Loss of a chunk's turns; gradients by log-prob and entropy, filled in for its rows."""
        turns = chunk.turns
        self.loss.turns(turns.start, turns.stop - turns.start, self.known.logprob, self.known.entropy)
        coef, slope = self.loss.coef, self.loss.entropy_slope
        return (coef, slope) if self.unit is None else (coef * self.unit, None if slope is None else slope * self.unit)


def linear_turn_policy_loss(
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (A,) int64
    bias: Tensor | None,  # (V,)
    temperature: float,
    arguments: LossArguments,  # its logprob and entropy are placeholders
    turn_offsets: Tensor,  # (N+1,) for the plan of chunks: on the CPU, or the host waits
) -> LinearTurnLoss:
    """See `atpo_kernels.linear_turn_policy_loss`."""
    inputs = HeadInputs(hidden, weight, bias)
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs]
    offsets = turn_offsets.cpu().numpy()
    with torch.no_grad():
        head = TritonHead.prepare(hidden, weight, bias, targets, temperature)
        loss = PackedLoss.prepare(arguments, nonempty_turns=int((np.diff(offsets) > 0).sum()))
        known = head.empty_statistics()
        if not any(needs):
            head.statistics(known, 0, len(targets))
            loss.turns(0, len(offsets) - 1, known.logprob, known.entropy)
            result = loss.finish()
            return LinearTurnLoss(result.loss, result.metrics, result.coef, known.logprob, known.entropy)
        capacity = rows_per_chunk(head)
        job = _Job(
            head=head,
            loss=loss,
            known=known,
            gradients=Gradients(head, needs),
            scratch=head.scratch(capacity),
            kept=KeptRows(len(targets), hidden.device) if _may_drop_rows(arguments.config, hidden) else None,
            unit=_unit(arguments) if hidden.dtype == torch.float16 else None,
        )
        for chunk in _chunks(offsets, max(capacity, 1), arguments.config.level):
            (job.one_pass if chunk.fits else job.two_pass)(chunk)
        gradients, result = job.gradients.finish(), loss.finish()
    value = with_gradients(result.loss, inputs, gradients, job.unit)
    return LinearTurnLoss(value, result.metrics, result.coef, known.logprob, known.entropy)


def _chunks(offsets: np.ndarray, capacity: int, level: RatioLevel) -> list[Chunk]:
    """Chunks of whole turns. At level sequence all rows are one chunk, since turns may share a trajectory."""
    rows, turns = int(offsets[-1]), len(offsets) - 1
    if level == "sequence":
        return [Chunk(slice(0, rows), slice(0, turns), rows <= capacity)] if rows else []
    return plan_chunks(offsets, capacity, False)


def _may_drop_rows(config: LossConfig, hidden: Tensor) -> bool:
    """Whether rows of coefficient 0 have no gradient, and the host may ask for their number."""
    capturing = hidden.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return not config.needs_entropy and not capturing


def _unit(arguments: LossArguments) -> Tensor:  # ()
    """A power of 2 that brings the largest weight of a token to about 1.

    float16 training scales the loss against underflow, but that factor only arrives with the backward: until then the
    gradients are kept in this unit.
    """
    weights, advantages = arguments.weights, arguments.advantages
    given = [advantages] if weights is None else [weights.pos, weights.neg, weights.all]
    sizes = [x.detach().abs().amax().float() for x in given if x is not None and x.numel()]
    largest = torch.stack(sizes).amax() if sizes else torch.ones((), device=arguments.inputs.logprob.device)
    if weights is None and arguments.aggregation.reduction != "sum":
        largest = largest / max(arguments.inputs.logprob.numel(), 1)
    return torch.exp2(-largest.clamp_min(2.0**-60).log2().floor())
