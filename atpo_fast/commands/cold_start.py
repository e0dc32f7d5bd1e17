"""`atpo-fast cold-start` (formerly `sft`): the cold start without RL, and its evaluation."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from atpo_fast.commands.launched import LaunchedVerb

if TYPE_CHECKING:
    from atpo_fast.train.run import Run


def cold_start(run: Run, arguments: argparse.Namespace) -> int:
    """Train on the demonstrations and evaluate the model; returns the exit code."""
    from atpo_fast.train.cold_start import cold_start as train_on_demonstrations
    from atpo_fast.train.evaluate import evaluate_step
    from atpo_fast.train.sampler import Sampler

    run.keep_config()
    folder = train_on_demonstrations(run)
    evaluate_step(run, Sampler(run, folder, run.device), 0)
    return 0


COLD_START = LaunchedVerb(
    name="cold-start",
    old_names=("sft",),
    summary="the cold start without RL: supervised training on demonstrations, loss on action tokens only",
    detail="Writes a Hugging Face folder into the run folder and evaluates it.",
    example="atpo-fast cold-start --config configs/quickstart.yaml cold_start.steps=100",
    work=cold_start,
)
