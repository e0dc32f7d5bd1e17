"""Whole runs with LoRA adapters: cold start, RL with a KL term, stopping, resuming and exporting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from atpo_fast.commands.cli import main
from tests.helpers.runs import records, run, write_config

LORA = (
    "model.lora.rank=4",
    "objective.kl=k3",
    "objective.kl_coef=0.1",
    "rollout.schedule=synchronous",
    "train.questions_per_minibatch=4",  # one update a step: the first begins at the reference policy
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps, after a cold start of all weights."""
    folder = tmp_path_factory.mktemp("whole")
    output = run(write_config(folder), *LORA)
    assert output.count("LoRA: trains 3,712 of ") == 1  # the cold start of a random model trains all weights
    return folder / "run"


def model(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def adapters(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "adapter/adapter_model.safetensors")


# Fails if the engine gets weights without their adapters or a tree token is forwarded twice, or if the reference policy
# is the adapted one or another model than the run began from.
def test_a_run_with_adapters(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["prefilled_tokens"] == summary["unique_tokens"] > 0
    steps = records(whole, "train")
    assert all(step["rollout/mismatch_kl"] < 1e-9 for step in steps.values())
    assert [step["policy/ref_kl"] > 1e-5 for step in steps.values()] == [False, True, True]
    start, end = model(whole / "cold_start"), model(whole / "checkpoints/step_000003/hf")
    changed = {name for name, value in end.items() if not torch.equal(value, start[name])}
    assert changed == {name for name in end if name.endswith("_proj.weight")}


# Fails if a checkpoint misses the adapters, their moments or the random numbers, or if a resumed run begins from the
# merged model, to which it would add the adapters once more.
def test_resuming_is_exact(whole: Path, tmp_path: Path) -> None:
    config, start = write_config(tmp_path), f"model.path={whole / 'cold_start'}"
    run(config, *LORA, start, "train.steps=2")
    assert "resumed from" in run(config, *LORA, start)
    for name, value in adapters(whole / "checkpoints/step_000003").items():
        assert torch.equal(adapters(tmp_path / "run/checkpoints/step_000003")[name], value), name
    for name, value in model(whole / "checkpoints/step_000003/hf").items():
        assert torch.equal(model(tmp_path / "run/checkpoints/step_000003/hf")[name], value), name


# Fails if the adapter file is not PEFT's, names another base, or merges to another model than the exported one; or if a
# checkpoint stores the frozen weights twice.
def test_exports(whole: Path, tmp_path: Path) -> None:
    assert main(["export", str(whole), str(tmp_path / "merged")]) == 0
    assert main(["export", "--adapters", str(whole), str(tmp_path / "adapters")]) == 0
    settings = json.loads((tmp_path / "adapters/adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"])
    merged = PeftModel.from_pretrained(base, tmp_path / "adapters").merge_and_unload()
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").named_parameters())
    for name, value in merged.named_parameters():
        torch.testing.assert_close(exported[name], value, rtol=0, atol=1e-6 * float(value.abs().max()))
    assert main(["export", "--adapters", str(whole / "cold_start"), str(tmp_path / "none")]) == 2


# Fails if the cold start of a given model trains all its weights, or RL begins without what it has learned.
def test_cold_start_with_adapters(whole: Path, tmp_path: Path) -> None:
    given = whole / "cold_start"
    options = [f"model.path={given}", "cold_start.when=always", "cold_start.steps=2", "train.steps=1"]
    output = run(write_config(tmp_path), *LORA, *options)
    assert output.count("LoRA: trains 3,712 of ") == 2
    before, after = model(given), model(tmp_path / "run/cold_start")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if name.endswith("_proj.weight")}
    (step,) = records(tmp_path / "run", "train").values()
    assert step["policy/ref_kl"] == pytest.approx(0, abs=1e-5) and step["rollout/mismatch_kl"] < 1e-9
