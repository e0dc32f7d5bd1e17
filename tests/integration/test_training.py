"""Whole runs in a tiny world: what they write, resuming, stopping, and failing politely."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TINY: dict[str, Any] = {
    "deepspeed": str(ROOT / "configs/deepspeed/zero3.json"),
    "device": "cpu",
    "data": {"source": "world", "prompt": "short", "max_prompt_tokens": 32},
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
    "cold_start": {"steps": 12, "batch_size": 16},
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

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The tiny configuration, writing to the test's own folder."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"run_dir": str(tmp_path / "run")}))
    return path


def start(config: Path, *overrides: str, limit_bytes: int | None = None) -> subprocess.Popen[str]:
    """`atpo-fast train` as a process."""

    def limit() -> None:
        assert limit_bytes is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.Popen(
        [sys.executable, "-m", "atpo_fast", "train", "--config", str(config), *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        preexec_fn=limit if limit_bytes else None,
    )


def run(config: Path, *overrides: str, code: int = 0, limit_bytes: int | None = None) -> str:
    """Run to the end; its output."""
    process = start(config, *overrides, limit_bytes=limit_bytes)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == code, output[-3000:]
    return output


def records(folder: Path, phase: str) -> dict[int, dict[str, Any]]:
    """Metrics of a phase by step; a step that was logged twice fails."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["phase"] == phase]
    assert len({line["step"] for line in found}) == len(found)
    return {line["step"]: line for line in found}


def weights(folder: Path, step: int) -> dict[str, Any]:
    return load_file(folder / "checkpoints" / f"step_{step:06d}" / "hf" / "model.safetensors")


# Fails when a part of the loop is not wired: no file, a token prefilled twice, or rewards that never vary.
def test_a_run_writes_everything(config: Path, tmp_path: Path) -> None:
    run(config)
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["prefilled_tokens"] == summary["unique_tokens"] > 0
    assert 0 < summary["overlap"] < 1
    assert {"cold_start_em", "final_em", "train_seconds", "random_guess_rate"} <= summary.keys()
    assert "</html>" in (folder / "report.html").read_text()
    assert sorted(records(folder, "train")) == [1, 2, 3]
    assert (folder / "checkpoints/step_000003/hf/tokenizer.json").is_file()
    assert len(list((folder / "checkpoints").iterdir())) == 2  # keep_checkpoints


# Fails when the checkpoint misses something: moments, data cursor, sampling seed, or the engine's weights.
def test_resuming_gives_the_same_next_step(config: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    exact = "rollout.schedule=synchronous"  # batches that do not depend on when a tool answers
    run(config, f"run_dir={whole}", exact)
    run(config, f"run_dir={halves}", exact, "train.steps=2")
    output = run(config, f"run_dir={halves}", exact)
    assert "resumed from" in output
    for key in ("reward/mean", "policy/loss", "policy/grad_norm", "tokens/unique"):
        assert records(halves, "train")[3][key] == pytest.approx(records(whole, "train")[3][key], rel=1e-5), key
    after, expected = weights(halves, 3), weights(whole, 3)
    for name, value in expected.items():
        assert (after[name] - value).abs().max() < 1e-6, name
    assert "nothing left to train" in run(config, f"run_dir={halves}", code=2)
    assert "another number of ranks" in run(config, f"run_dir={halves}", "train.steps=4", "ranks=2", code=2)


# Fails when the batch rolled out ahead has other questions or seeds, counts as fresh, or a resumed run loses a step. At
# a learning rate of almost 0 older weights are the same weights.
def test_rolling_out_a_step_ahead(config: Path, tmp_path: Path) -> None:
    options = ["optim.lr=1e-12", "rollout.schedule=synchronous"]
    run(config, *options)
    expected = records(tmp_path / "run", "train")
    run(config, *options, "train.max_staleness=1", f"run_dir={tmp_path}/ahead", "train.steps=2")
    run(config, *options, "train.max_staleness=1", f"run_dir={tmp_path}/ahead")
    found = records(tmp_path / "ahead", "train")
    assert [found[step]["rollout/staleness"] for step in (1, 2, 3)] == [0, 1, 0]  # the third after resuming
    for step, record in expected.items():
        for name in ("reward/mean", "rollout/turns", "rollout/entropy", "tokens/unique", "tokens/prefilled"):
            assert found[step][name] == pytest.approx(record[name], rel=1e-6), (step, name)


# Fails when a rank sees another share of questions or rows than its own, or averages differently.
def test_two_ranks_take_the_same_step_as_one(config: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(config, f"run_dir={one}", "train.steps=1")
    run(config, f"run_dir={two}", "train.steps=1", "ranks=2", f"model.path={one / 'cold_start'}")
    for key in ("reward/mean", "policy/loss", "policy/grad_norm", "tokens/unique", "tokens/prefilled"):
        assert records(two, "train")[1][key] == pytest.approx(records(one, "train")[1][key], rel=1e-4), key


# Fails when a stopped run saves nothing, or a killed one leaves something that the next cannot start from.
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_continues(config: Path, tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    process = start(config, "train.steps=200")
    deadline = time.monotonic() + 900
    while not list(folder.glob("checkpoints/step_*/state.json")):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    if number != signal.SIGKILL:
        assert "the same command continues" in output
    done = max(json.loads(p.read_text())["step"] for p in folder.glob("checkpoints/step_*/state.json"))
    assert done < 200
    assert "resumed from" in run(config, f"train.steps={done + 1}")


# Fails when a checkpoint that could not be written hides the reason or damages the one before.
def test_full_disk(config: Path, tmp_path: Path) -> None:
    run(config, "train.steps=1")
    output = run(config, "train.steps=2", code=2, limit_bytes=50_000)
    assert "could not write" in output and "is intact" in output
    assert "resumed from" in run(config, "train.steps=2")
