"""`atpo-fast train`: cold start where needed, RL, evaluation, summary, report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atpo_fast.commands.launched import LaunchedVerb
from atpo_fast.common.errors import STOPPED
from atpo_fast.common.files import replacing

if TYPE_CHECKING:
    from atpo_fast.train.run import Run


def train(run: Run, arguments: argparse.Namespace) -> int:
    """Train to the last step, then write the summary and the report; returns the exit code."""
    from atpo_fast.train.cold_start import check_vocabulary, starting_model
    from atpo_fast.train.from_config import make_objective
    from atpo_fast.train.identity import RUN, claim
    from atpo_fast.train.loop import Trainer

    resume_from = _checkpoint_to_resume(run)
    claim(run, run.folder / "run.json", RUN, continued=resume_from is not None)
    run.keep_config()
    _check(run)
    if resume_from is None or make_objective(run.config).loss_config.needs_reference:
        start, seconds = starting_model(run)
    else:
        start, seconds = resume_from / "hf", 0.0
    check_vocabulary(run, start)
    trainer = Trainer(run, start, resume_from, seconds)
    if not trainer.fit():
        return STOPPED
    if run.is_main:
        _finish(run, trainer.state.summary(trainer.seconds) | {"seed": run.config.seed, **run.task.notes})
    return 0


def _checkpoint_to_resume(run: Run) -> Path | None:
    """Find the checkpoint to resume from, if there is one and the configuration wants it.

    Raises FileNotFoundError under `train.resume=must` without a checkpoint, ValueError when nothing is left to train,
    and CheckpointError when no checkpoint is intact.
    """
    from atpo_fast.train.checkpoints import newest_intact, read_state

    train = run.config.train
    found = newest_intact(run, run.folder) if train.resume != "never" else None
    if found is None:
        if train.resume == "must":
            raise FileNotFoundError(f"train.resume=must, but {run.folder}/checkpoints has no checkpoint")
        return None
    done = read_state(found)["step"]
    if done >= train.steps and (run.folder / "summary.json").is_file():
        raise ValueError(
            f"nothing left to train: {found} has finished step {done} of train.steps={train.steps}; "
            "raise train.steps, choose another run_dir, or set train.resume=never"
        )
    return found


def _check(run: Run) -> None:
    """Raise ValueError, before the cold start, for what would be found out after it."""
    if run.config.method == "react":
        raise ValueError("method=react has nothing to train: use `atpo-fast eval` with model.path, or another method")
    from atpo_fast.engines import check_engine
    from atpo_fast.environment import check_tools
    from atpo_fast.train.from_config import make_objective, max_prefix

    max_prefix(run.config, make_objective(run.config))
    check_engine(run.config)
    check_tools(run.config.tools)


def _finish(run: Run, summary: dict[str, Any]) -> None:
    """Write summary.json and the report, and say how it went."""
    from atpo_fast.report import build_report

    with replacing(run.folder / "summary.json") as partial:
        partial.write_text(json.dumps(summary, indent=1) + "\n")
    run.progress.message(_closing_words(summary, len(run.task.eval), build_report(run.folder)))


def _closing_words(summary: dict[str, Any], questions: int, page: Path) -> str:
    if not questions:
        words = "nothing was evaluated: there are no evaluation questions (data.eval_files)"
        return f"{words}; {summary['train_seconds']:.0f} s; report: {page}"
    words = (
        f"EM on {questions} evaluation questions: {summary['cold_start_em']:.3f} before RL, "
        f"{summary['final_em']:.3f} after"
    )
    if "random_guess_rate" in summary:
        words += f" (guessing at random: {summary['random_guess_rate']:.3f})"
    return f"{words}; {summary['train_seconds']:.0f} s; report: {page}"


TRAIN = LaunchedVerb(
    name="train",
    summary="cold start where the task has demonstrations, RL, evaluation, summary and report",
    detail="Writes the run folder (run_dir): config.yaml, metrics.jsonl, trees.jsonl, eval/, checkpoints/, "
    "summary.json, report.html. Started again with the same run_dir it continues from the newest checkpoint.",
    example="atpo-fast train --config configs/quickstart.yaml run_dir=runs/mine train.steps=10",
    work=train,
    tells_cost=True,
)
