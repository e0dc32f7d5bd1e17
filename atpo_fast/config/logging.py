"""Section `logging`: where metrics and progress are shown, and what is worth an alarm."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from atpo_fast.config.section import STRICT


@dataclass(config=STRICT, kw_only=True)
class AlarmConfig:
    """Conditions of a step that are worth a line, and more; null switches one off."""

    action: Literal["tell", "save", "stop"] = "tell"
    """What an alarm does. tell: it writes a line. save: a checkpoint too. stop: a checkpoint, and the run ends; the
    same command continues."""
    steps: int = Field(default=2, ge=1)
    """Number of successive steps for which a condition has to hold."""
    min_entropy: float | None = Field(default=0.005, ge=0)
    """Entropy (nats a token) below which the policy has collapsed, unless nearly all answers are right."""
    min_format: float | None = Field(default=0.1, ge=0, le=1)
    """Share of trajectories in the asked format below which something is wrong with prompt or policy."""
    format_drop: float | None = Field(default=0.5, gt=0, le=1)
    """Part of the highest such share so far that may be lost."""
    equal_rewards: bool = True
    """Whether it is an alarm that all trajectories of each question earn the same, unless all answers are right."""
    max_logprob_gap: float | None = Field(default=0.1, gt=0)
    """Mean difference of the log-probs of engine and trainer (nats a token) under the same weights."""
    max_clipped: float | None = Field(default=0.5, gt=0, le=1)
    """Share of action tokens whose ratio is clipped."""
    max_tool_failures: float | None = Field(default=0.2, gt=0, le=1)
    """Share of the calls of a tool that fail or are answered with nothing."""
    max_staleness: int | None = Field(default=2, ge=0)
    """Number of steps by which the weights behind a batch may be older than those that learn from it."""
    not_finite: bool = True
    """Whether a metric or a gradient that is not finite is an alarm, at once."""


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
    alarms: AlarmConfig = Field(default_factory=AlarmConfig)
    """Alarms."""
