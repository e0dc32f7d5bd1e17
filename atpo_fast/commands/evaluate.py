"""`atpo-fast eval`: greedy answers to the evaluation questions."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from atpo_fast.commands.launched import LaunchedVerb
from atpo_fast.commands.model_folder import newest_model

if TYPE_CHECKING:
    from atpo_fast.train.run import Run


def evaluate(run: Run, arguments: argparse.Namespace) -> int:
    """Evaluate `model.path`, or else the run folder's newest model, and print the means; returns the exit code."""
    from atpo_fast.train.evaluate import evaluate as answer_questions
    from atpo_fast.train.sampler import Sampler

    given = run.config.model.path
    sampler = Sampler(run, given or newest_model(run.folder), run.device)
    means = answer_questions(run, sampler, "given" if given else "newest")
    if run.is_main:
        print(json.dumps(means, indent=1))
    return 0


EVALUATE = LaunchedVerb(
    name="eval",
    summary="greedy answers to the evaluation questions: EM, F1, format rate, turns, tool calls",
    detail="Evaluates model.path, or else the newest checkpoint of run_dir; prints the means as JSON.",
    example="atpo-fast eval --config runs/quickstart/config.yaml data.max_eval_questions=50",
    work=evaluate,
)
