"""A whole run in a tiny world: what it writes, and two ranks. More of them: tests/integration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.runs import records, run, write_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from its cold start to its report."""
    folder = tmp_path_factory.mktemp("whole")
    run(write_config(folder))
    return folder / "run"


# Fails when a part of the loop is not wired: no file, a token prefilled twice, or rewards that never vary.
def test_a_run_writes_everything(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["prefilled_tokens"] == summary["unique_tokens"] > 0
    assert 0 < summary["overlap"] < 1
    assert {"cold_start_em", "final_em", "train_seconds", "random_guess_rate"} <= summary.keys()
    assert "</html>" in (whole / "report.html").read_text()
    assert sorted(records(whole, "train")) == [1, 2, 3]
    assert (whole / "checkpoints/step_000003/hf/tokenizer.json").is_file()
    assert len(list((whole / "checkpoints").iterdir())) == 2  # keep_checkpoints


# Fails when a rank sees another share of questions or rows than its own, or averages differently. The first step of the
# whole run is that of one rank: it too starts from the model of the cold start.
def test_two_ranks_take_the_same_step_as_one(tmp_path: Path, whole: Path) -> None:
    one, two = records(whole, "train")[1], tmp_path / "run"
    run(write_config(tmp_path), "train.steps=1", f"model.path={whole / 'cold_start'}", "ranks=2")
    (step,) = records(two, "train").values()
    assert one["tokens/prefilled"] == one["tokens/unique"]  # with the streaming schedule too
    for key in ("reward/mean", "policy/loss", "policy/grad_norm", "tokens/unique", "tokens/prefilled"):
        assert step[key] == pytest.approx(one[key], rel=1e-4), key
