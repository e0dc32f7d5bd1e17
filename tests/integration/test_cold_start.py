"""The cold start: from given weights, from a GGUF file, interrupted and continued, validated."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.helpers.forked_runs import ForkedProcess, finish, start_command
from tests.helpers.gguf_files import write_gguf
from tests.helpers.runs import records, run, write_config


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that has been trained a little."""
    folder = tmp_path_factory.mktemp("given")
    run(
        write_config(folder),
        "train.steps=1",
        "cold_start.steps=12",
        "cold_start.validation_share=0.2",
        "cold_start.validate_every=5",
    )
    return folder / "run"


def cold_start(config: Path, *overrides: str) -> ForkedProcess:
    return start_command("cold-start", "--config", str(config), *overrides)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


# Fails when validation trains, is of the trained demonstrations, or is not logged when it is due.
def test_validation(given: Path) -> None:
    logged = records(given, "cold_start")
    assert [step for step, values in logged.items() if "cold_start/validation_loss" in values] == [5, 10, 12]
    losses = [
        values["cold_start/validation_loss"] for values in logged.values() if "cold_start/validation_loss" in values
    ]
    assert losses[-1] < losses[0]


# Fails when a cold start that is asked for is skipped because a model is given (it was, without a word), or begins with
# random weights.
def test_given_weights(config: Path, tmp_path: Path, given: Path) -> None:
    start = f"model.path={given / 'cold_start'}"
    output = run(config, start, "train.steps=1", f"run_dir={tmp_path}/skipped")
    assert "no cold start: RL starts from the weights of model.path" in output
    assert not (tmp_path / "skipped/cold_start").exists()
    run(config, start, "train.steps=1", "cold_start.when=always", "cold_start.lr=1e-12", f"run_dir={tmp_path}/kept")
    kept, before = weights(tmp_path / "kept/cold_start"), weights(given / "cold_start")
    assert all((kept[name] - value).abs().max() < 1e-6 for name, value in before.items())
    run(config, start, "train.steps=1", "cold_start.when=always", f"run_dir={tmp_path}/trained")
    first = records(tmp_path / "trained", "cold_start")[1]["cold_start/loss"]
    assert first < records(given, "cold_start")[1]["cold_start/loss"] - 0.2  # it goes on, it does not begin
    assert not same(weights(tmp_path / "trained/cold_start"), before)


# Fails when a stopped cold start begins again, or goes on with other moments, batches or learning rates than unbroken.
@pytest.mark.parametrize("stage", ["zero0", "zero3"])
def test_a_stopped_cold_start_continues(config: Path, tmp_path: Path, stage: str) -> None:
    options = ["cold_start.steps=24", "cold_start.save_every=3", f"deepspeed=configs/deepspeed/{stage}.json"]
    finish(cold_start(config, *options, f"run_dir={tmp_path}/whole"))
    broken, folder = [*options, f"run_dir={tmp_path}/broken"], tmp_path / "broken/cold_start"
    assert any(stopped_in_the_middle(config, broken, folder) for _ in range(10))
    assert "cold start: resumed from" in finish(cold_start(config, *broken))
    assert same(weights(tmp_path / "whole/cold_start"), weights(folder))
    for step, values in records(tmp_path / "whole", "cold_start").items():
        assert values["cold_start/loss"] == records(tmp_path / "broken", "cold_start")[step]["cold_start/loss"], step
    assert not (folder / "checkpoints").exists()


def stopped_in_the_middle(config: Path, options: list[str], folder: Path) -> bool:
    """Stop a cold start behind its first checkpoint; False, and nothing is left of it, if it was done before."""
    process = cold_start(config, *options)
    while not list(folder.glob("checkpoints/step_*/state.json")) and process.poll() is None:
        time.sleep(0.05)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    if "the same command continues" in output:
        return True
    assert (folder / "state.json").is_file(), output[-2000:]
    shutil.rmtree(folder.parent)
    return False


# Fails when the model of a GGUF file does not reach the tokenizer, the policy or the engine, or its turns do not end.
def test_training_from_a_gguf_file(config: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "tiny.gguf")
    data = {
        "question": "Who?",
        "answer": "Lin",
        "supporting_facts": [["Lin", 0]],
        "context": [["Lin", ["Lin is Lin."]]],
    }
    (tmp_path / "questions.jsonl").write_text(
        "".join(json.dumps(data | {"question": f"Who {i}?"}) + "\n" for i in range(8))
    )
    output = run(
        config,
        f"model.path={file}",
        "data.source=files",
        f"data.train_files=[{tmp_path}/questions.jsonl]",
        f"data.corpus_files=[{tmp_path}/questions.jsonl]",
        "data.max_prompt_tokens=64",
        "data.max_eval_questions=1",
        "cold_start.from_evidence=true",
        "cold_start.steps=2",
        "train.steps=1",
    )
    assert "converting tiny.gguf" in output
    (step,) = records(tmp_path / "run", "train").values()
    assert step["tokens/prefilled"] == step["tokens/unique"] and step["rollout/mismatch_kl"] < 1e-5
    saved = json.loads((tmp_path / "run/checkpoints/step_000001/hf/tokenizer_config.json").read_text())
    assert saved["eos_token"] == "<|im_end|>"
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]["path"] == str(file)


# Fails when a model that cannot be used is found out after something expensive.
def test_models_that_cannot_be_used(config: Path, tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none", "no such folder or file"), (config, "a file; give")):
        output = run(config, f"model.path={path}", code=2)
        assert words in output and "Traceback" not in output
    output = run(config, "cold_start.when=always", "cold_start.validation_share=0.999", code=2)
    assert "leaves none of 64 demonstrations" in output
