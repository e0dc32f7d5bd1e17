"""Run a trial from the cold start that all share, and keep what it measured; a trial that has a record is read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.core.records import RESULTS, commit
from bench.methods.plan import CONFIG, ROOT, WORLD_SEED, Trial

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
    em: float
    by_hops: dict[str, float]


def measure(trial: Trial) -> dict[str, Any]:
    """Return the record of a trial, from its file or, the first time, from a run."""
    path = RECORDS / f"{trial.slug}.json"
    if not path.exists():
        folder = RUNS / trial.slug
        shutil.rmtree(folder, ignore_errors=True)
        spent = _call("train", folder, [*trial.overrides, f"model.path={cold_start()}"])
        record = {
            "contender": trial.contender.name,
            "seed": trial.seed,
            "rate": trial.rate,
            "budget": trial.budget.generated,
            "overrides": trial.overrides,
            "commit": commit(),
            "cpu_seconds": spent,
            "points": [vars(point) for point in curve(folder)],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(folder)
    return dict(json.loads(path.read_text()))


def cold_start() -> Path:
    """Return the model that all trials start from; it is trained the first time."""
    folder = RUNS / f"cold_start_seed{WORLD_SEED}"
    if not (folder / "cold_start" / "model.safetensors").exists():
        _call("cold-start", folder, [f"seed={WORLD_SEED}", f"world.seed={WORLD_SEED}"])
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


def _call(verb: str, folder: Path, overrides: list[str]) -> float:
    """Run a command on one thread; returns the CPU seconds of all its processes."""
    command = [sys.executable, "-m", "atpo_fast", verb, "--config", str(CONFIG), f"run_dir={folder}", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=told, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # of this process and those that it waited for
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            told.seek(0)
            raise RuntimeError(f"{' '.join(command)}\nended with {process.returncode}:\n{told.read()[-3000:]}")
    return usage.ru_utime + usage.ru_stime
