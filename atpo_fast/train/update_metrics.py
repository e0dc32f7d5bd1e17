"""What is measured while a step updates the policy: means of the rows' metrics, and the mismatch with the engine."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from atpo_fast.common.errors import MismatchError
from atpo_fast.common.ranks import reduce_over_ranks
from atpo_fast.tree.packed_rows import PackedTrees

MAX_METRICS = ("ratio_max",)  # of these the largest counts, not the mean
PER_STEP = ("loss", "router_loss")  # sums over the rows of a step


class MetricMean:
    """Means of row metrics weighted by action tokens; sums stay on the device until `result`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        self._tokens: Tensor | None = None
        self._grad_norms: list[float] = []
        self._steps = 0

    def add(self, metrics: dict[str, Tensor], loss: Tensor) -> None:
        """Add one row's metrics and its share of the loss."""
        tokens = metrics["tokens"].to(torch.float64)
        self._tokens = tokens if self._tokens is None else self._tokens + tokens
        for name, value in metrics.items():
            if name in MAX_METRICS:
                self._maxima[name] = torch.maximum(self._maxima.get(name, value), value)
            elif name not in ("tokens", "turns"):
                weighted = torch.where(tokens > 0, value.to(torch.float64) * tokens, 0.0)
                self._sums[name] = self._sums.get(name, torch.zeros_like(weighted)) + weighted
        self._sums["loss"] = self._sums.get("loss", torch.zeros_like(tokens)) + loss.detach().to(torch.float64)

    def add_router_loss(self, loss: Tensor) -> None:
        """Add this rank's part of the routers' losses in a step, () float64."""
        self._sums["router_loss"] = self._sums.get("router_loss", torch.zeros_like(loss)) + loss

    def step_taken(self, grad_norm: float | None) -> None:
        """Count an optimizer step, and note its gradient norm where it is known."""
        self._steps += 1
        if grad_norm is not None:
            self._grad_norms.append(grad_norm)

    def result(self) -> dict[str, float]:
        """Average over all rows of all ranks; a collective."""
        out = {"grad_norm": sum(self._grad_norms) / len(self._grad_norms)} if self._grad_norms else {}
        if self._tokens is None:
            return out
        names, peaks = sorted(self._sums), sorted(self._maxima)
        sums = torch.stack([self._sums[n].to(self._tokens.device) for n in names] + [self._tokens]).cpu()
        maxima = torch.tensor([float(self._maxima[n]) for n in peaks], dtype=torch.float64)
        reduce_over_ranks(sums)
        reduce_over_ranks(maxima, dist.ReduceOp.MAX)
        tokens = max(float(sums[-1]), 1.0)
        for name, value in zip(names, sums[:-1].tolist(), strict=True):
            out[name] = value / max(self._steps, 1) if name in PER_STEP else value / tokens
        return out | dict(zip(peaks, maxima.tolist(), strict=True))


class Mismatch:
    """KL between the engine's and the trainer's log-probs of the same tokens, under the same weights.

    Taken from the forward of a batch's first update, so it costs nothing; it catches weights that were not synced,
    another temperature, or another tokenizer at once.
    """

    def __init__(self, limit: float):
        self._limit = limit
        self._sums: list[Tensor] = []
        self.kl: float | None = None  # mean k3, nats a token
        self.gap = 0.0  # mean absolute difference of the log-probs, nats a token

    def add(self, row: PackedTrees, logprob: Tensor) -> None:
        """Add the (A,) log-probs of a row to the sums."""
        difference = (logprob - row.rollout_logprob).double()
        fresh = row.trajectory_count > 0  # repeated and padding tokens have no log-prob of the engine's
        fresh &= ~row.rollout_logprob.isnan()  # nor have tokens that were appended to a turn
        k3 = torch.where(fresh, torch.expm1(difference) - difference, 0.0)
        gap = torch.where(fresh, difference.abs(), 0.0)
        self._sums.append(torch.stack([k3.sum(), gap.sum(), fresh.sum().double()]))

    def settle(self) -> None:
        """Average over the ranks; a collective. Raises MismatchError above the limit."""
        total = reduce_over_ranks(torch.stack(self._sums).sum(0).cpu())
        self.kl, self.gap = (total[:2] / total[2].clamp(min=1)).tolist()
        if not self.kl <= self._limit:
            raise MismatchError(
                f"the log-probs of engine and trainer differ by {self.kl:.3g} nats a token (k3), more than "
                f"train.max_mismatch_kl={self._limit}: are weights synced, and do temperature and dtype agree?"
            )
