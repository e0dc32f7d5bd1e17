"""Whole runs in a tiny world: what they write, resuming, stopping, and failing politely."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.helpers.runs import launch, records, run, start, write_config

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


# Fails when the batch rolled out ahead has other questions or seeds, counts as fresh, or a resumed run loses a step. At
# a learning rate of almost 0 older weights are the same weights.
def test_rolling_out_a_step_ahead(config: Path, tmp_path: Path, whole: Path) -> None:
    options = ["optim.lr=1e-12", EXACT, f"model.path={whole / 'cold_start'}"]
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
def test_dynamic_sampling(config: Path, tmp_path: Path, whole: Path) -> None:
    on = [f"model.path={whole / 'cold_start'}"]
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
def test_methods_train(config: Path, tmp_path: Path, whole: Path, method: str) -> None:
    start = f"model.path={whole / 'cold_start'}"
    lengths = "reward.overlong.share=0.99"  # nothing is answered yet: length alone makes rewards differ
    output = run(config, f"method={method}", start, lengths, "train.steps=1")
    (step,) = records(tmp_path / "run", "train").values()
    assert step["policy/grad_norm"] > 0 and step["rollout/mismatch_kl"] < 1e-6
    assert step["count/trees"] == (8 if method == "tree_grpo" else 4)
    assert "but with" not in output


# Fails when a rank sees another share of questions or rows than its own, or averages differently.
def test_two_ranks_take_the_same_step_as_one(config: Path, tmp_path: Path, whole: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["train.steps=1", f"model.path={whole / 'cold_start'}"]
    run(config, f"run_dir={one}", *options)
    run(config, f"run_dir={two}", *options, "ranks=2", launched=True)
    (step,) = records(one, "train").values()
    assert step["tokens/prefilled"] == step["tokens/unique"]  # with the streaming schedule too
    for key in ("reward/mean", "policy/loss", "policy/grad_norm", "tokens/unique", "tokens/prefilled"):
        assert records(two, "train")[1][key] == pytest.approx(records(one, "train")[1][key], rel=1e-4), key


# Fails when a stopped run saves nothing (only a killed one has saved before), or a killed one leaves something that the
# next cannot start from.
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL])
def test_a_stopped_run_continues(config: Path, tmp_path: Path, whole: Path, number: signal.Signals) -> None:
    folder, given = tmp_path / "run", f"model.path={whole / 'cold_start'}"
    killed = number == signal.SIGKILL
    process = (launch if number == signal.SIGINT else start)(
        config, given, "train.steps=200", f"train.save_every={1 if killed else 0}"
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
    assert "resumed from" in run(config, given, f"train.steps={done + 1}")


def steps_done(folder: Path) -> int:
    """Steps of RL that a running run has logged."""
    log = folder / "metrics.jsonl"
    return log.read_text().count('"phase": "train"') if log.exists() else 0


# Fails when a checkpoint that could not be written hides the reason, damages the one before or leaves a part of itself
# or says it once for each rank, or when a file that cannot be written elsewhere ends in a traceback: here the
# configuration, then the model of the cold start.
def test_full_disk(config: Path, tmp_path: Path, whole: Path) -> None:
    start, folder = f"model.path={whole / 'cold_start'}", tmp_path / "run"
    run(config, start, "train.steps=1")
    output = run(config, start, "train.steps=2", "ranks=2", code=2, limit_bytes=50_000)
    assert output.count("could not write") == 1 and "is intact" in output and "Traceback" not in output
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000001"]
    assert "resumed from" in run(config, start, "train.steps=2")
    for bytes_left in (1_000, 50_000):
        output = run(config, f"run_dir={tmp_path}/new", code=2, limit_bytes=bytes_left)
        (line,) = [line for line in output.splitlines() if line.startswith("error:")]
        assert "cannot be written" in line and "Free space" in line and "Traceback" not in output


# Fails when the survivor of a killed rank says that the disk is full (it did), or hangs, or the exit code is not that
# of the rank that was killed.
def test_a_killed_rank_is_told(config: Path, tmp_path: Path, whole: Path) -> None:
    process = start(config, "train.steps=200", "ranks=2", f"model.path={whole / 'cold_start'}")
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
