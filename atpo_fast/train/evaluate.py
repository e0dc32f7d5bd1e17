"""Evaluation: greedy answers to the evaluation questions."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from atpo_fast.common.errors import StopRequested
from atpo_fast.rollout import in_order
from atpo_fast.train.run import Run
from atpo_fast.train.sampler import Sampler
from atpo_fast.train.scoring import ScoredTree, score

KEYS = ("em", "f1", "format", "turns", "tool_calls")


def evaluate(run: Run, sampler: Sampler, name: str) -> dict[str, float]:
    """Average EM, F1, format rate, turns and tool calls over the evaluation questions.

    The answers go to `eval/NAME.jsonl`. A question whose only chain failed counts as wrong.

    Raises:
        StopRequested: the run was asked to stop.
    """
    questions = run.task.eval
    with run.timer.phase("eval"):
        mine = run.share(questions)
        records: list[dict[str, Any]] = []
        run.progress.start_phase("eval", len(mine))
        with suppress(StopRequested):  # the ranks have to find out together
            for begin in range(0, len(mine), run.config.eval.batch_size):
                batch = mine[begin : begin + run.config.eval.batch_size]
                trees = in_order(sampler.roll_out(batch, seed=run.config.seed, greedy=True))
                records += [_record(scored) for scored in score(run, batch, trees, validation=True)]
        run.stop_together()
        records = run.gather(records, len(questions))
    means = {f"eval/{key}": sum(float(r[key]) for r in records) / max(1, len(records)) for key in KEYS}
    means["eval/questions"] = float(len(records))
    if run.is_main:
        _write(run.folder / "eval" / f"{name}.jsonl", records)
    return means


def evaluate_step(run: Run, sampler: Sampler, step: int) -> dict[str, float]:
    """Evaluate as part of training, and log the means as a record of the metrics."""
    means = evaluate(run, sampler, f"step_{step:06d}")
    run.logger.log("eval", step, means)
    return means


def _record(scored: ScoredTree) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": scored.question.id,
        "question": scored.question.text,
        "answers": scored.question.answers,
    }
    if not scored.scores:
        return record | {"answer": None, "em": 0.0, "f1": 0.0, "format": False, "turns": 0, "tool_calls": 0}
    leaf = scored.scores[0]
    return record | {
        "answer": leaf.answer,
        "em": leaf.em,
        "f1": leaf.f1,
        "format": leaf.format_ok,
        "turns": leaf.turns,
        "tool_calls": leaf.tool_calls,
    }


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
