"""Telemetry of a run: metrics, phase times, progress."""

from atpo_fast.telemetry.phases import PhaseTimer
from atpo_fast.telemetry.progress import Progress
from atpo_fast.telemetry.run_logger import RunLogger, read_metrics

__all__ = ["PhaseTimer", "Progress", "RunLogger", "read_metrics"]
