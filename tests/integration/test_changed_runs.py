"""A run that goes on under other settings is refused, and told which."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.forked_runs import finish, start_command
from tests.helpers.runs import run, write_config

EXACT = "rollout.schedule=synchronous"


# 9 of 9 such changes went on without a word, and the new size was written over the old one. Fails when one of them does
# again, when a harmless one stops a run, or when a refused run has changed the folder.
def test_a_changed_run_is_refused_in_words(tmp_path: Path) -> None:
    config, folder = write_config(tmp_path), tmp_path / "run"
    run(config, EXACT, "train.steps=1")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    changes = {
        "seed=3": "seed: 0 before, 3 now",
        "model.hidden_size=64": "model.hidden_size: 32 before, 64 now",
        "objective.preset=grpo": "objective.preset: 'at2po' before, 'grpo' now",
        "world.seed=5": "world.seed: 0 before, 5 now",
        "optim.lr=1e-4": "optim.lr: 0.001 before, 0.0001 now",
        "train.questions_per_step=6": "train.questions_per_step: 4 before, 6 now",
        "rollout.temperature=0.5": "rollout.temperature: 1.0 before, 0.5 now",
        "world.train_questions=30": "training questions: others (40",
    }
    output = run(config, EXACT, "train.steps=2", *changes, code=2)
    assert "is of something else" in output and "train.on_change=continue" in output
    for words in changes.values():
        assert words in output
    assert "(harmless) train.steps: 1 before, 2 now" in output
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    output = run(config, EXACT, "train.steps=2", "optim.lr=1e-4", "train.on_change=continue")
    assert "THE RUN GOES ON AS SOMETHING ELSE (train.on_change): optim.lr" in output
    assert "harmless: train.steps: 1 before, 2 now" in output
    (changed,) = json.loads((folder / "run.json").read_text())["changes"]
    assert changed[0].startswith("optim.lr")
    command = ["rollout", "--config", str(config), EXACT, "--questions=1"]
    for more, code in ([], 0), (["rollout.top_k=3"], 2):
        output = finish(start_command(*command, *more), code)
    assert "the file of search trees in it is of something else" in output and "rollout.top_k: 0 before" in output
