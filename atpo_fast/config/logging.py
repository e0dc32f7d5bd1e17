"""Section `logging`: where metrics and progress are shown."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from atpo_fast.config.section import STRICT


@dataclass(config=STRICT, kw_only=True)
class LoggingConfig:
    """Destinations of metrics beside metrics.jsonl, which is always written."""

    tensorboard: bool = False
    """Whether TensorBoard events are written (needs tensorboard)."""
    wandb_project: str | None = None
    """Name of the Weights & Biases project (needs wandb); none: nothing is sent."""
    progress: Literal["auto", "live", "plain", "off"] = "auto"
    """Display during the run. live: two lines that redraw. plain: a line per step. auto: live on a terminal that
    can redraw, else plain. off: nothing."""
