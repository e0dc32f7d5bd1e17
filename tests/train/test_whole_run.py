"""A whole run in a tiny world: what it writes, resuming it, and two ranks. More of them: tests/integration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.helpers.runs import records, run, write_config

EXACT = "rollout.schedule=synchronous"  # batches that do not depend on when a tool answers


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The tiny configuration, writing to the test's own folder."""
    return write_config(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from its cold start to its report, launched as a user's is, with a hash seed of its own."""
    folder = tmp_path_factory.mktemp("whole")
    run(write_config(folder), EXACT, launched=True)
    return folder / "run"


def weights(folder: Path, step: int) -> dict[str, Any]:
    return load_file(folder / "checkpoints" / f"step_{step:06d}" / "hf" / "model.safetensors")


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


# Fails when the checkpoint misses something (moments, data cursor, sampling seed, the engine's weights), or when a run
# depends on the order of a set, which differs from process to process.
def test_resuming_gives_the_same_next_step(config: Path, tmp_path: Path, whole: Path) -> None:
    halves = tmp_path / "run"
    run(config, EXACT, "train.steps=2")
    output = run(config, EXACT)
    assert "resumed from" in output
    for key in ("reward/mean", "policy/loss", "policy/grad_norm", "tokens/unique"):
        assert records(halves, "train")[3][key] == pytest.approx(records(whole, "train")[3][key], rel=1e-5), key
    after, expected = weights(halves, 3), weights(whole, 3)
    for name, value in expected.items():
        assert (after[name] - value).abs().max() < 1e-6, name
    assert "nothing left to train" in run(config, code=2)
    other = run(config, EXACT, "train.steps=4", "ranks=2", "deepspeed=configs/deepspeed/zero2.json")
    assert "was written by 1 ranks; 2 continue it" in other


# Fails when a rank sees another share of questions or rows than its own, or averages differently.
def test_two_ranks_take_the_same_step_as_one(config: Path, tmp_path: Path, whole: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["train.steps=1", f"model.path={whole / 'cold_start'}"]
    run(config, f"run_dir={one}", *options)
    run(config, f"run_dir={two}", *options, "ranks=2")
    (step,) = records(one, "train").values()
    assert step["tokens/prefilled"] == step["tokens/unique"]  # with the streaming schedule too
    for key in ("reward/mean", "policy/loss", "policy/grad_norm", "tokens/unique", "tokens/prefilled"):
        assert records(two, "train")[1][key] == pytest.approx(records(one, "train")[1][key], rel=1e-4), key
