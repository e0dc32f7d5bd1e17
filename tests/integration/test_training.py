"""Whole runs in a tiny world: resuming, what they can be told to do, stopping, and failing politely."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.helpers.runs import cold_start, launch, records, run, start, write_config

EXACT = "rollout.schedule=synchronous"  # batches that do not depend on when a tool answers


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is started as a user's is, with a hash seed of its own."""
    folder = tmp_path_factory.mktemp("launched")
    run(write_config(folder), EXACT, launched=True)
    return folder / "run"


def weights(folder: Path, step: int) -> dict[str, Any]:
    return load_file(folder / "checkpoints" / f"step_{step:06d}" / "hf" / "model.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override that gives a model to start from."""
    return f"model.path={cold_start(tmp_path_factory.mktemp('model'))}"


# Fails when the checkpoint misses something (moments, data cursor, sampling seed, the engine's weights), or when a run
# depends on the order of a set, which differs from process to process.
def test_resuming_gives_the_same_next_step(config: Path, tmp_path: Path, launched: Path) -> None:
    halves = tmp_path / "run"
    run(config, EXACT, "train.steps=2")
    output = run(config, EXACT)
    assert "resumed from" in output
    for key in ("reward/mean", "policy/loss", "policy/grad_norm", "tokens/unique"):
        assert records(halves, "train")[3][key] == pytest.approx(records(launched, "train")[3][key], rel=1e-5), key
    after, expected = weights(halves, 3), weights(launched, 3)
    for name, value in expected.items():
        assert (after[name] - value).abs().max() < 1e-6, name
    assert "nothing left to train" in run(config, code=2)
    other = run(config, EXACT, "train.steps=4", "ranks=2", "deepspeed=configs/deepspeed/zero2.json")
    assert "was written by 1 ranks; 2 continue it" in other


# Fails when the batch rolled out ahead has other questions or seeds, counts as fresh, or a resumed run loses a step. At
# a learning rate of almost 0 older weights are the same weights.
def test_rolling_out_a_step_ahead(config: Path, tmp_path: Path, model: str) -> None:
    options = ["optim.lr=1e-12", EXACT, model]
    run(config, *options)
    expected = records(tmp_path / "run", "train")
    run(config, *options, "train.max_staleness=1", f"run_dir={tmp_path}/ahead", "train.steps=2")
    run(config, *options, "train.max_staleness=1", f"run_dir={tmp_path}/ahead")
    found = records(tmp_path / "ahead", "train")
    assert [found[step]["rollout/staleness"] for step in (1, 2, 3)] == [0, 1, 0]  # the third after resuming
    for step, record in expected.items():
        for name in ("reward/mean", "rollout/turns", "rollout/entropy", "tokens/unique", "tokens/prefilled"):
            assert found[step][name] == pytest.approx(record[name], rel=1e-6), (step, name)


# Nothing is answered yet, so length alone makes rewards differ, for some questions. Fails when ranks decide each for
# itself (they would wait for each other for ever), the cursor or the surplus is lost by a resume, or what is rolled out
# ahead are questions of another place. At a learning rate of almost 0 the weights stay the same.
def test_dynamic_sampling(config: Path, tmp_path: Path, model: str) -> None:
    on = [model]
    on += ["train.dynamic_sampling.enabled=true", "train.dynamic_sampling.max_refills=2", "optim.lr=1e-12"]
    on += ["train.dynamic_sampling.surplus=keep", "train.dynamic_sampling.on_exhausted=continue"]
    on += ["rollout.schedule=synchronous", "reward.overlong.share=0.97"]
    on += ["rollout.strategy=chain", "train.dynamic_sampling.questions_per_rollout=3"]
    output = run(config, *on, "train.max_staleness=1")
    expected = records(tmp_path / "run", "train")
    assert output.count("dynamic sampling:") == 3
    for name in ("refills", "kept", "dropped"):  # or this tests nothing
        assert sum(record[f"sampling/{name}"] for record in expected.values()) > 0, name
    state = json.loads((tmp_path / "run/checkpoints/step_000003/state.json").read_text())
    assert state["cursor"] == sum(record["sampling/questions"] for record in expected.values())
    same = [*on, f"run_dir={tmp_path}/two", "ranks=2"]
    run(config, *same, "train.steps=2")
    run(config, *same)
    found = records(tmp_path / "two", "train")
    for step, record in expected.items():
        for name in ("dropped", "kept", "trained", "refills"):
            assert found[step][f"sampling/{name}"] == record[f"sampling/{name}"], (step, name)
        assert found[step]["tokens/trained"] == record["tokens/trained"], step
        assert found[step]["policy/loss"] == pytest.approx(record["policy/loss"], rel=1e-3, abs=1e-6), step


# Each needs a station that the others do not: branches by entropy and a factor by token, several trees a question, and
# the gold answer's probability with a clip range for each turn. Fails when one of them does not reach the update.
@pytest.mark.parametrize("method", ["aepo", "tree_grpo", "a2tgpo"])
def test_methods_train(config: Path, tmp_path: Path, model: str, method: str) -> None:
    lengths = "reward.overlong.share=0.99"  # nothing is answered yet: length alone makes rewards differ
    output = run(config, f"method={method}", model, lengths, "train.steps=1")
    (step,) = records(tmp_path / "run", "train").values()
    assert step["policy/grad_norm"] > 0 and step["rollout/mismatch_kl"] < 1e-6
    assert step["count/trees"] == (8 if method == "tree_grpo" else 4)
    assert "but with" not in output


# Fails when a stopped run saves nothing (only a killed one has saved before), or a killed one leaves something that the
# next cannot start from.
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL])
def test_a_stopped_run_continues(config: Path, tmp_path: Path, model: str, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    killed = number == signal.SIGKILL
    launched = number == signal.SIGINT  # with two ranks, from a shell, as a user's are
    options = [model, "ranks=2"] if launched else [model]
    process = (launch if launched else start)(
        config, *options, "train.steps=200", f"train.save_every={1 if killed else 0}"
    )
    deadline = time.monotonic() + 900
    while not (list(folder.glob("checkpoints/step_*/state.json")) if killed else steps_done(folder)):
        assert process.poll() is None, process.communicate(timeout=60)[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    codes = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143, signal.SIGKILL: -9}
    assert process.returncode == codes[number]
    if not killed:
        assert "the same command continues" in output
    done = max(json.loads(p.read_text())["step"] for p in folder.glob("checkpoints/step_*/state.json"))
    assert done < 200
    assert "resumed from" in run(config, *options, f"train.steps={done + 1}")


def steps_done(folder: Path) -> int:
    """Steps of RL that a running run has logged."""
    log = folder / "metrics.jsonl"
    return log.read_text().count('"phase": "train"') if log.exists() else 0


# Fails when a checkpoint that could not be written hides the reason, damages the one before or leaves a part of itself
# or says it once for each rank, or when a file that cannot be written elsewhere ends in a traceback: here the
# configuration, then the model of the cold start.
def test_full_disk(config: Path, tmp_path: Path, model: str) -> None:
    folder = tmp_path / "run"
    run(config, model, "train.steps=1")
    output = run(config, model, "train.steps=2", "ranks=2", code=2, limit_bytes=50_000)
    assert output.count("could not write") == 1 and "is intact" in output and "Traceback" not in output
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000001"]
    assert "resumed from" in run(config, model, "train.steps=2")
    for bytes_left in (1_000, 50_000):
        output = run(config, f"run_dir={tmp_path}/new", code=2, limit_bytes=bytes_left)
        (line,) = [line for line in output.splitlines() if line.startswith("error:")]
        assert "cannot be written" in line and "Free space" in line and "Traceback" not in output


# Fails when the survivor of a killed rank says that the disk is full (it did), or hangs, or the exit code is not that
# of the rank that was killed.
def test_a_killed_rank_is_told(config: Path, tmp_path: Path, model: str) -> None:
    process = start(config, "train.steps=200", "ranks=2", model)
    deadline = time.monotonic() + 900
    while steps_done(tmp_path / "run") < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    (launcher,) = psutil.Process(process.pid).children()
    max(launcher.children(), key=lambda rank: rank.pid).kill()  # rank 1: rank 0 tells
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 137
    assert "a rank was ended by SIGKILL" in output and "another rank has ended" in output
    assert "Free space" not in output and "Traceback" not in output
