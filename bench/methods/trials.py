"""Run a trial from the shared cold start of its seed, and keep what it measured; a trial that has a record is read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.core.records import RESULTS, commit
from bench.methods.plan import CONFIG, ROOT, Trial

RUNS = ROOT / "runs" / "compare"
RECORDS = RESULTS / "cpu" / "methods"


@dataclass(frozen=True)
class Point:
    """One evaluation of a run."""

    step: int
    generated: float
    """Number of tokens sampled so far."""
    trained: float
    """Number of unique tokens forwarded in updates so far."""
    seconds: float
    """Seconds of rollouts and updates so far."""
    em: float
    by_hops: dict[str, float]


def measure(trial: Trial) -> dict[str, Any]:
    """Return the record of a trial, from its file or, the first time, from a run."""
    path = RECORDS / f"{trial.slug}.json"
    if not path.exists():
        folder = RUNS / trial.slug
        _train(folder, [*trial.overrides, f"model.path={cold_start(trial.seed)}"])
        record = {
            "contender": trial.contender.name,
            "seed": trial.seed,
            "rate": trial.rate,
            "budget": trial.budget.generated,
            "overrides": trial.overrides,
            "commit": commit(),
            "points": [vars(point) for point in curve(folder)],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(folder)
    return dict(json.loads(path.read_text()))


def cold_start(seed: int) -> Path:
    """Return the model that all contenders of a seed start from; it is trained the first time."""
    folder = RUNS / f"cold_start_seed{seed}"
    if not (folder / "cold_start" / "model.safetensors").exists():
        _call("cold-start", folder, [f"seed={seed}", f"world.seed={seed}"])
    return folder / "cold_start"


def curve(folder: Path) -> list[Point]:
    """Return the evaluations of a run, with what had been spent until each."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {record["step"]: record for record in records if record["phase"] == "train"}
    points = []
    for record in records:
        if record["phase"] == "eval":
            before = [steps[step] for step in sorted(steps) if step <= record["step"]]
            em, by_hops = _accuracy(folder / "eval" / f"step_{record['step']:06d}.jsonl")
            points.append(
                Point(
                    step=record["step"],
                    generated=sum(step["tokens/decoded"] for step in before),
                    trained=sum(step["tokens/trained"] for step in before),
                    seconds=sum(step["time/rollout"] + step["time/update"] for step in before),
                    em=em,
                    by_hops=by_hops,
                )
            )
    return points


def _accuracy(path: Path) -> tuple[float, dict[str, float]]:
    """Return EM of an evaluation, in all and by the number of relations that a question follows."""
    found: dict[str, list[float]] = defaultdict(list)
    for line in path.read_text().splitlines():
        answer = json.loads(line)
        found[str(answer["question"].count(" of "))].append(answer["em"])
    every = [em for group in found.values() for em in group]
    return sum(every) / len(every), {hops: sum(group) / len(group) for hops, group in sorted(found.items())}


def _train(folder: Path, overrides: list[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _call("train", folder, overrides)


def _call(verb: str, folder: Path, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "atpo_fast", verb, "--config", str(CONFIG), f"run_dir={folder}", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\nended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
