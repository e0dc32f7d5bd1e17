"""Runs over tasks of a user's own: the commands of docs/tasks.md, and one that is started as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_commands import lines
from tests.helpers.examples import output
from tests.helpers.forked_runs import ROOT, finish, start_command
from tests.helpers.own_task import write_own_task
from tests.helpers.pages import blocks
from tests.helpers.runs import TINY, records

SHELL = [block for block in blocks(ROOT / "docs/tasks.md") if block.language == "sh"]
OWN = [words for block in SHELL for words in lines(block.code) if words[0] == "atpo-fast"]


@pytest.mark.parametrize("words", OWN, ids=lambda words: str(next((w for w in words if "run_dir" in w), "own_task")))
def test_own_task(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a command of docs/tasks.md does not train on its file with its reward."""
    monkeypatch.chdir(ROOT)
    output("examples/own_task/formats.py", str(tmp_path))
    words = [word.replace("data.root=runs/formats", f"data.root={tmp_path}") for word in words[1:]]
    finish(start_command(*words, "train.steps=2", f"run_dir={tmp_path / 'run'}", "device=cpu"))
    logged = records(tmp_path / "run", "train")[2]
    rewards = {"run_dir=runs/verl": "compute_score", "run_dir=runs/trl": "accuracy", "run_dir=runs/jsonl": "judge"}
    name = next((rewards[word] for word in words if word in rewards), "close")
    assert f"reward/{name}" in logged and logged["reward/format"] > 0.5


@pytest.mark.slow(reason="launches a run as a user does, whose processes import PyTorch")
def test_a_launched_run_finds_the_users_code(tmp_path: Path) -> None:
    """Fails if the processes of a run look for the user's code elsewhere than the command, or metrics lack a reward."""
    write_own_task(tmp_path)
    command = [sys.executable, "-m", "atpo_fast", "train", "--config", str(write_tiny_step(tmp_path))]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    logged = records(tmp_path / "run", "train")[1]
    assert logged["reward/right"] == 1.0 and logged["reward/mean"] == 1.0 + 0.5 * logged["reward/format"]


def write_tiny_step(folder: Path) -> Path:
    """Write a configuration of one tiny step over the questions and the task of the folder."""
    data = {"train_files": ["questions.jsonl"], "max_prompt_tokens": 32}
    tiny = {name: TINY[name] for name in ("deepspeed", "device", "optim", "credit", "logging")}
    tiny["rollout"] = {"initial_chains": 2, "expansion_rounds": 0, "max_response_tokens": 4}
    tiny["model"] = TINY["model"] | {"vocab_size": 300}
    tiny["train"] = TINY["train"] | {"steps": 1, "questions_per_step": 2, "save_every": 0, "eval_every": 0}
    tiny |= {"run_dir": "run", "data": data, "tools": {"builtin": []}, "task": {"file": "mine/task.py"}}
    path = folder / "config.yaml"
    path.write_text(json.dumps(tiny))
    return path
