"""Whole runs of `atpo-fast train` in a tiny world, and what they logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.forked_runs import ForkedProcess, finish, start_command

ROOT = Path(__file__).resolve().parents[2]
TINY: dict[str, Any] = {
    "deepspeed": str(ROOT / "configs/deepspeed/zero3.json"),
    "device": "cpu",
    "data": {"source": "world", "max_prompt_tokens": 32},
    "task": {"prompt": "short"},
    "world": {
        "entities": 12,
        "relations": 2,
        "max_hops": 2,
        "train_questions": 40,
        "eval_questions": 6,
        "demonstrations": 64,
    },
    "model": {"dtype": "float32", "hidden_size": 32, "layers": 2, "head_dim": 8, "intermediate_size": 48},
    "rollout": {
        "initial_chains": 3,
        "expansion_rounds": 1,
        "expansions_per_round": 2,
        "max_turn_tokens": 16,
        "max_response_tokens": 160,
    },
    "optim": {"lr": 1e-3},
    "cold_start": {"steps": 4, "batch_size": 16},
    "train": {
        "steps": 3,
        "questions_per_step": 4,
        "questions_per_minibatch": 2,
        "row_tokens": 1024,
        "save_every": 1,
        "old_logprobs": "rollout",
    },
    "credit": {"leaf_norm": False},  # so barely trained rewards, all -1, still make a gradient
    "logging": {"progress": "plain"},
}


def write_config(folder: Path) -> Path:
    """Write the tiny configuration, whose runs go into the same folder; its path."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"run_dir": str(folder / "run")}))
    return path


def start(config: Path, *overrides: str, limit_bytes: int | None = None) -> ForkedProcess:
    """`atpo-fast train`, its processes forked from one that has imported everything."""
    return start_command("train", "--config", str(config), *overrides, limit_bytes=limit_bytes)


def launch(config: Path, *overrides: str) -> subprocess.Popen[str]:
    """`python -m atpo_fast train`, its processes started as a user's are."""
    return subprocess.Popen(
        [sys.executable, "-m", "atpo_fast", "train", "--config", str(config), *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def run(config: Path, *overrides: str, code: int = 0, limit_bytes: int | None = None, launched: bool = False) -> str:
    """Run to the end, as forks or launched as a user's run is; its output."""
    process = launch(config, *overrides) if launched else start(config, *overrides, limit_bytes=limit_bytes)
    return finish(process, code)


def cold_start(folder: Path) -> Path:
    """Run the verb of the cold start in a folder; the folder of the model, which has hardly learned anything."""
    finish(start_command("cold-start", "--config", str(write_config(folder))))
    return folder / "run/cold_start"


def records(folder: Path, phase: str) -> dict[int, dict[str, Any]]:
    """Metrics of a phase by step; a step that was logged twice fails."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["phase"] == phase]
    assert len({line["step"] for line in found}) == len(found)
    return {line["step"]: line for line in found}
