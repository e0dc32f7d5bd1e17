"""Launches of `linear_turn_policy_loss`: gradient in the forward, logits of a chunk computed once.

Per chunk of whole turns: (1) one product gives the softmax statistics and leaves the exponentials in a scratch buffer;
(2) the turns' losses and coefficients; (3) d loss / d logits in place of the exponentials, without the rows that are
skipped; (4) two products give the gradients of hidden and weight. The host has to know how many rows are left to launch
(4): it reads their number while the device is busy with (3), so that the device never waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from atpo_kernels.arguments import LossArguments
from atpo_kernels.autograd import attach_gradients
from atpo_kernels.choices import RatioLevel
from atpo_kernels.linear_logprob.launch import Gradients, Scratch, Statistics, TritonHead, rows_per_chunk
from atpo_kernels.linear_turn_policy_loss.kernels import _kept_rows_kernel, _softmax_gradient_kernel
from atpo_kernels.linear_turn_policy_loss.tiles import KEPT_BLOCK, Chunk, gradient_tile, plan_chunks
from atpo_kernels.records import HeadInputs, HeadOptions, LinearTurnLoss, LossConfig
from atpo_kernels.turn_policy_loss.launch import PackedLoss


class KeptRows:
    """Rows of a range that are not skipped, found and counted on the device."""

    def __init__(self, capacity: int, device: torch.device):
        self.index = torch.empty(capacity, dtype=torch.int32, device=device)  # counted from the range's start
        self.count = torch.empty(1, dtype=torch.int32, device=device)
        self._on_host = torch.empty(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def find(self, grad_logprob: Tensor, start: int, rows: int) -> None:  # (A,)
        """Start to look for the rows of [start, start + rows) whose gradient is not 0."""
        _kept_rows_kernel[(1,)](grad_logprob, self.index, self.count, start, rows, BLOCK=KEPT_BLOCK, num_warps=8)
        self._on_host.copy_(self.count, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> int:
        """Return their number, once the device has come as far as `find`; what was launched since is not waited for."""
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._on_host.numpy()[0])


def softmax_gradient(
    head: TritonHead,
    scratch: Scratch,
    known: Statistics,  # (A,) each
    grads: tuple[Tensor, Tensor | None],  # (A,) float32 upstream, of log-prob and entropy
    start: int,
    rows: int | KeptRows,  # all of that many rows, or the kept ones
) -> None:
    """Turn the exponentials of a chunk's rows into the gradients by their logits, the kept rows first."""
    kept, count, every = (None, rows, True) if isinstance(rows, int) else (rows.index, rows.count, False)
    tile = gradient_tile(scratch.dlogits.device)
    _softmax_gradient_kernel[(scratch.references.shape[0] * tile.parts,)](
        *scratch, kept, count, head.targets,
        known.logprob, known.entropy, known.peak, known.log_total, *grads, start,
        scratch.dlogits.stride(0), scratch.references.shape[1], head.scale, 1 / head.temperature,
        ALL_ROWS=every, HAS_ENTROPY=grads[1] is not None, PARTS=tile.parts, PREFETCH=tile.prefetch,
        ROWS=tile.rows, COLUMNS=head.tile.columns // tile.parts, num_warps=4,
    )  # fmt: skip


@dataclass(slots=True)
class _Job:
    """Work of one call, whose gradients are added up chunk by chunk."""

    head: TritonHead
    loss: PackedLoss
    known: Statistics  # (A,) each
    gradients: Gradients
    scratch: Scratch
    kept: KeptRows | None  # None: no row is skipped
    unit: Tensor | None  # () see `_unit`

    def one_pass(self, chunk: Chunk) -> None:
        """Compute the logits of whole turns once."""
        start, rows = chunk.rows.start, chunk.rows.stop - chunk.rows.start
        self.head.statistics(self.known, start, rows, self.scratch)
        grads = self.upstream(chunk)
        hidden = self.head.hidden[chunk.rows]
        if self.kept is None:
            softmax_gradient(self.head, self.scratch, self.known, grads, start, rows)
            self.gradients.add(self.scratch.dlogits[:rows], hidden, chunk.rows)
            return
        self.kept.find(grads[0], start, rows)
        softmax_gradient(self.head, self.scratch, self.known, grads, start, self.kept)
        count = self.kept.wait()
        if count == rows:
            self.gradients.add(self.scratch.dlogits[:rows], hidden, chunk.rows)
        elif count:
            index = self.kept.index[:count].long()
            self.gradients.add(self.scratch.dlogits[:count], hidden.index_select(0, index), index + start)

    def two_pass(self, chunk: Chunk) -> None:
        """Compute all statistics of turns of any length first, then their logits again for the gradients."""
        start, rows = chunk.rows.start, chunk.rows.stop - chunk.rows.start
        self.head.statistics(self.known, start, rows)
        grads = self.upstream(chunk)
        index = torch.arange(start, start + rows, device=self.head.hidden.device)
        if self.kept is not None:
            self.kept.find(grads[0], start, rows)
            index = self.kept.index[: self.kept.wait()].long() + start
        for at in index.split(len(self.scratch.dlogits)) if index.numel() else ():
            head = self.head.take(at)
            known = Statistics(*(x[at] for x in self.known))
            grad_entropy = None if grads[1] is None else grads[1][at]
            dlogits = head.dlogits(self.scratch.dlogits, known, grads[0][at], grad_entropy, 0, len(at))
            self.gradients.add(dlogits, head.hidden, at)

    def upstream(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:  # (A,), (A,)
        """Evaluate the loss of a chunk's turns; return gradients by log-prob and entropy, filled in for its rows."""
        turns = chunk.turns
        self.loss.turns(turns.start, turns.stop - turns.start, self.known.logprob, self.known.entropy)
        by_logprob, by_entropy = self.loss.grad_logprob, self.loss.grad_entropy
        if self.unit is None:
            return by_logprob, by_entropy
        return by_logprob * self.unit, None if by_entropy is None else by_entropy * self.unit


def linear_turn_policy_loss_triton(
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (A,) int64
    bias: Tensor | None,  # (V,)
    options: HeadOptions,
    arguments: LossArguments,  # its logprob and entropy are placeholders
    turn_offsets: Tensor,  # (N+1,) for the plan of chunks: on the CPU, or the host waits
) -> LinearTurnLoss:
    """Compute `linear_turn_policy_loss` by Triton kernels; see there."""
    inputs = HeadInputs(hidden, weight, bias)
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs]
    offsets = _on_host(turn_offsets).numpy()
    with torch.no_grad():
        head = TritonHead.prepare(hidden, weight, bias, targets, options)
        loss = PackedLoss.prepare(arguments, nonempty_turns=int((np.diff(offsets) > 0).sum()))
        known = head.empty_statistics()
        if not any(needs):
            head.statistics(known, 0, len(targets))
            loss.turns(0, len(offsets) - 1, known.logprob, known.entropy)
            result = loss.finish()
            return LinearTurnLoss(result.loss, result.metrics, result.grad_logprob, known.logprob, known.entropy)
        capacity = rows_per_chunk(head)
        job = _Job(
            head=head,
            loss=loss,
            known=known,
            gradients=Gradients(head, needs),
            scratch=head.scratch(capacity),
            kept=KeptRows(len(targets), hidden.device) if _may_skip_rows(arguments.config, hidden) else None,
            unit=_unit(arguments) if hidden.dtype == torch.float16 else None,
        )
        for chunk in _chunks(offsets, max(capacity, 1), arguments.config.level):
            (job.one_pass if chunk.fits else job.two_pass)(chunk)
        gradients, result = job.gradients.finish(), loss.finish()
    value = attach_gradients(result.loss, inputs, gradients, unit=job.unit, consume=True)
    return LinearTurnLoss(value, result.metrics, result.grad_logprob, known.logprob, known.entropy)


def _on_host(turn_offsets: Tensor) -> Tensor:
    """Copy the offsets to the host, which plans the chunks by them. Raises RuntimeError where it must not wait."""
    if turn_offsets.device.type != "cpu" and _is_capturing(turn_offsets.device):
        raise RuntimeError(
            "linear_turn_policy_loss: turn_offsets are on the device while a CUDA graph is captured, but the host has "
            "to read them to plan the chunks; give them on the CPU"
        )
    return turn_offsets.cpu()


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _chunks(offsets: np.ndarray, capacity: int, level: RatioLevel) -> list[Chunk]:
    """Plan chunks of whole turns. At level sequence all rows are one chunk, since turns may share a trajectory."""
    rows, turns = int(offsets[-1]), len(offsets) - 1
    if level == "sequence":
        return [Chunk(slice(0, rows), slice(0, turns), rows <= capacity)] if rows else []
    return plan_chunks(offsets, capacity, False)


def _may_skip_rows(config: LossConfig, hidden: Tensor) -> bool:
    """Say whether rows of coefficient 0 have no gradient, and the host may ask for their number."""
    return not config.needs_entropy and not _is_capturing(hidden.device)


def _unit(arguments: LossArguments) -> Tensor:  # ()
    """Choose a power of 2 that brings the largest weight of a token to about 1.

    float16 training scales the loss against underflow, but that factor only arrives with the backward: until then the
    gradients are kept in this unit.
    """
    weights, advantages = arguments.weights, arguments.advantages
    given = [advantages] if weights is None else [weights.pos, weights.neg, weights.all]
    sizes = [x.detach().abs().amax().float() for x in given if x is not None and x.numel()]
    largest = torch.stack(sizes).amax() if sizes else torch.ones((), device=arguments.inputs.logprob.device)
    if weights is None and arguments.averaging.reduction != "sum":
        largest = largest / max(arguments.inputs.logprob.numel(), 1)
    return torch.exp2(-largest.clamp_min(2.0**-60).log2().floor())
