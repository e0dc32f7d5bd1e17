"""A run that goes wrong tells its cause on the terminal within two steps."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.runs import records, run, write_config

REWARD = "def always_half(trajectory):\n    return 0.5\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned to search and to answer."""
    folder = tmp_path_factory.mktemp("model")
    run(write_config(folder), "train.steps=1", "cold_start.steps=60", "cold_start.lr=1e-2", "eval.batch_size=1")
    return folder / "run/cold_start"


def two_steps(folder: Path, *overrides: str, code: int = 0) -> list[str]:
    return run(write_config(folder), "train.steps=2", "data.max_eval_questions=1", *overrides, code=code).splitlines()


def alarms(lines: list[str]) -> dict[str, str]:
    return {line.split()[1].rstrip(","): line for line in lines if line.startswith("ALARM")}


# Fails when a healthy run raises an alarm, or its outcomes do not add up.
def test_a_healthy_run_is_quiet(model: Path, tmp_path: Path) -> None:
    lines = two_steps(tmp_path, f"model.path={model}")
    assert not alarms(lines)
    for record in records(tmp_path / "run", "train").values():
        shares = [share for name, share in record.items() if name.startswith("outcome/")]
        assert sum(shares) == pytest.approx(1) and len(shares) == 11
        assert record["reward/format"] > 0.1 and record["outcome/wrong"] > 0
        assert record["policy/updates"] == 2


# Fails when a policy that answers in another form than is asked for goes on for days at a reward of -1.
def test_a_wrong_prompt(model: Path, tmp_path: Path) -> None:
    lines = two_steps(tmp_path, f"model.path={model}", "task.answer=hashes", "credit.leaf_norm=true")
    assert "0% of the trajectories keep the format" in alarms(lines)["format"]
    assert "no_answer" in alarms(lines)["format"] and "task.answer" in alarms(lines)["format"]
    assert any("no update, because no trajectory earned more" in line for line in lines)


# Fails when a run begins without its search server; tests/environment has one that dies on the way.
def test_a_dead_search_server(model: Path, tmp_path: Path) -> None:
    dead = ["tools.search_backend=http", "tools.search_url=http://127.0.0.1:9/retrieve"]
    lines = two_steps(tmp_path, f"model.path={model}", *dead, code=1)
    (line,) = [line for line in lines if line.startswith("error:")]
    assert "127.0.0.1:9" in line and "Connection refused" in line and "Start a retrieval server" in line


# Fails when nobody hears that right and wrong answers earn the same.
def test_a_broken_reward(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARD)
    reward = f"task.rewards=[{{function: '{tmp_path / 'mine.py'}:always_half'}}]"
    lines = two_steps(tmp_path, f"model.path={model}", reward, "logging.alarms.action=stop", code=2)
    assert "earn the same, 0.500 on average" in alarms(lines)["equal_rewards"]
    (line,) = [line for line in lines if line.startswith("error:")]
    assert "by the alarms equal_rewards" in line and "a checkpoint is saved" in line
    assert (tmp_path / "run/checkpoints/step_000002").is_dir()


# Fails when a policy that always says the same is trained on in silence.
def test_a_collapsed_policy(model: Path, tmp_path: Path) -> None:
    collapsed = tmp_path / "collapsed"
    shutil.copytree(model, collapsed)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= 300  # logits of hundreds
    save_file(weights, collapsed / "model.safetensors", metadata={"format": "pt"})
    lines = two_steps(tmp_path, f"model.path={collapsed}")
    assert "it hardly tries anything else" in alarms(lines)["entropy"]
