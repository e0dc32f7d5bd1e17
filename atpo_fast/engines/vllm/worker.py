"""Extensions that vLLM's workers load: top-k and top-p that report how much probability they keep, and new weights.

vLLM reports one log-prob of a sampled token: under the distribution it was drawn from. The trainer also needs the one
without truncation, which is that plus the log of the probability that the truncation kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from atpo_fast.engines.sampling import SamplingTable, truncate


@dataclass(slots=True)
class _Row:
    """A request of the batch whose sampling is truncated by top-k or top-p."""

    name: str
    top_k: int
    top_p: float
    output_ids: list[int]  # vLLM's own list, which grows

    @classmethod
    def of(cls, params: Any, output_ids: list[int]) -> _Row | None:
        """Build the row of a request with these parameters; None when it is not truncated."""
        wanted = (params.extra_args or {}).get("truncation")
        return None if wanted is None else cls(wanted["name"], wanted["top_k"], wanted["top_p"], output_ids)


class Truncation(LogitsProcessor):  # type: ignore[misc]
    """A logits processor that truncates requests with `extra_args["truncation"]`, after temperature."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self._rows: dict[int, _Row] = {}
        # Per step: (request, index of its token) of each row, and the log of the probability that was kept.
        self._steps: list[tuple[list[tuple[str, int]], Tensor]] = []
        self._log_kept: dict[str, dict[int, float]] = {}  # log of the kept probability by request and index

    def is_argmax_invariant(self) -> bool:
        """Return True, so that vLLM applies it after temperature, and not to greedy batches."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the changes of the batch: removals, additions, moves, in this order."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, output_ids in batch_update.added:
            self._place(index, _Row.of(params, output_ids))
        for source, target, direction in batch_update.moved:
            moving, other = self._rows.pop(source, None), self._rows.pop(target, None)
            self._place(target, moving)
            if direction == MoveDirectionality.SWAP:
                self._place(source, other)

    def apply(self, logits: Tensor) -> Tensor:
        """Set what is cut of (N, V) float32 logits to minus infinity, in place."""
        if not self._rows:
            return logits
        indices, rows = list(self._rows), list(self._rows.values())
        table = SamplingTable(
            np.ones(len(rows)), np.array([row.top_k for row in rows]), np.array([row.top_p for row in rows])
        )
        weights, tokens = truncate(torch.log_softmax(logits[indices], dim=-1), table)
        kept = torch.zeros_like(logits[indices], dtype=torch.bool).scatter_(1, tokens, weights > 0)
        logits[indices] = logits[indices].masked_fill(~kept, float("-inf"))
        names = [(row.name, len(row.output_ids)) for row in rows]
        self._steps.append((names, weights.sum(dim=-1).log()))
        return logits

    def take(self, names: Sequence[str]) -> list[list[float]]:
        """Return, for each of some requests, the log of the kept probability of each token; then forget them."""
        for rows, values in self._steps:
            for (name, index), value in zip(rows, values.tolist(), strict=True):
                # A chunk of a prompt is sampled from as well, in vain: of several values the last counts.
                self._log_kept.setdefault(name, {})[index] = value
        self._steps.clear()
        taken = [self._log_kept.pop(name, {}) for name in names]
        return [[values[index] for index in sorted(values)] for values in taken]

    def _place(self, index: int, row: _Row | None) -> None:
        if row is None:
            self._rows.pop(index, None)
        else:
            self._rows[index] = row


class WorkerExtension:
    """Methods added to vLLM's worker, called by `collective_rpc`."""

    def take_log_kept_probability(self, names: Sequence[str]) -> list[list[float]]:
        """Return what `Truncation.take` returns for some requests."""
        processors = self.model_runner.input_batch.logitsprocs.all  # type: ignore[attr-defined]
        return next(processor.take(names) for processor in processors if isinstance(processor, Truncation))

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights, by Hugging Face name.

        On CPU vLLM multiplies with a packed copy of a matrix, and when it loads again it packs only what has come. A
        head that is tied to the embedding does not come, so it is packed here; what has kept its `weight` can be.
        """
        self.reload_weights(weights_iterator=weights)  # type: ignore[attr-defined]
        if self.device.type == "cpu":  # type: ignore[attr-defined]
            for module in self.model_runner.get_model().modules():  # type: ignore[attr-defined]
                if hasattr(module, "cpu_linear") and module.weight.numel():
                    module.quant_method.process_weights_after_loading(module)
