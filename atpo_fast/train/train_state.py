"""The state of training that a checkpoint holds beside weights and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class TrainState:
    """Counts and places of the RL loop."""

    step: int = 0  # number of steps done
    optimizer_steps: int = 0
    skipped_steps: int = 0  # optimizer steps that were left out because a gradient was not finite
    seconds: float = 0.0  # time spent so far, cold start included
    cold_start_em: float | None = None
    eval_em: float | None = None
    eval_step: int = -1  # step of the evaluation behind `eval_em`
    cursor: int = 0  # place of the next question in the order of questions (`atpo_fast.train.schedule.Draw`)
    kept: list[list[int]] = field(default_factory=list)  # surplus: (place, weights_step, trees) of each group
    totals: dict[str, float] = field(default_factory=dict)  # token counts since the start of RL
    alarms: dict[str, float] = field(default_factory=dict)  # what `atpo_fast.telemetry.alarms` remembers

    def summary(self, seconds: float) -> dict[str, Any]:
        """Return the contents of `summary.json` for a training that took `seconds`."""
        totals = self.totals
        return {
            "cold_start_em": self.cold_start_em,
            "final_em": self.eval_em,
            "train_seconds": seconds,
            "steps": self.step,
            "optimizer_steps": self.optimizer_steps,
            "prefilled_tokens": int(totals.get("prefilled", 0)),
            "shared_tokens": int(totals.get("shared", 0)),
            "decoded_tokens": int(totals.get("decoded", 0)),
            "cache_hit_tokens": int(totals.get("cache_hit", 0)),
            "unique_tokens": int(totals.get("unique", 0)),
            "flat_tokens": int(totals.get("flat", 0)),
            "trained_tokens": int(totals.get("trained", 0)),
            "pruned_tokens": int(totals.get("pruned", 0)),
            "skipped_backward_tokens": int(totals.get("skipped_backward", 0)),
            "overlap": 1 - totals["unique"] / totals["flat"] if totals.get("flat") else 0.0,
        }
