"""Under ZeRO-3 a model loads as transformers loads it, and no rank holds it whole meanwhile."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from atpo_fast.adapters import AdapterSettings
from atpo_fast.config import LoRAConfig
from atpo_fast.policy import load_model
from atpo_fast.train import loading
from atpo_fast.train.loading import load_for_training
from atpo_fast.train.weights import load_policy, trained_line, whole_parameters, with_adapters
from tests.helpers.families import FAMILIES, make
from tests.helpers.forked_runs import fork_ranks
from tests.helpers.loading import compare, measure, same, settings
from tests.helpers.lone_rank import lone_rank

MiB = 1 << 20
SIZES = dict(vocab_size=1024, hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one rank."""
    with lone_rank():
        yield


@pytest.mark.distributed
def test_a_rank_holds_its_share_and_a_weight(tmp_path: Path) -> None:
    """Fails if a rank has the model whole at any time, or the shares put together are not the weights of the file.

    At once there are the shares so far, and of one weight what was read, in the dtype that is wanted, and its copy. The
    slack is for what allocators keep; a model of 94 MiB is large enough beside it. What is loaded in the dtype of the
    file takes memory only when it is written to, as DeepSpeed's broadcast does on all ranks but one.
    """
    model = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=6, head_dim=64, tie_word_embeddings=False, **SIZES))
    whole, largest = sum(p.nbytes for p in model.parameters()), max(p.nbytes for p in model.parameters())
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype).save_pretrained(tmp_path / "models" / str(dtype))
    fork_ranks(measure, 2, tmp_path / "models", tmp_path)
    bound = whole // 2 + 2 * largest + 16 * MiB
    assert bound < 0.8 * whole
    for rank in (0, 1):
        peaks = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(peaks) == 2 and all(peak < bound for peak in peaks.values()), (rank, peaks, bound)


@pytest.mark.distributed
def test_every_family_loads_as_transformers_loads_it(tmp_path: Path) -> None:
    """Fails if a name, joined experts, a tie or a dtype is another one, or a buffer is rounded with the weights."""
    for name in FAMILIES:
        make(name, torch.float32).save_pretrained(tmp_path / name)
    fork_ranks(compare, 2, tmp_path)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """Write a tiny Qwen3 with tied embeddings into a folder, and edit the weights of its file."""
    make("qwen3", torch.float32).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("added", [0.0, 1.0])
def test_a_file_with_both_of_two_tied_weights(added: float, alone: None, tmp_path: Path) -> None:
    """Fails if a head that differs from the embedding is lost, or an equal one is trained on its own."""
    name = "model.embed_tokens.weight"
    folder = change(tmp_path, lambda weights: weights.update({"lm_head.weight": weights[name] + added}))
    mine, other = load_for_training(settings("float32"), folder), load_model(folder, torch.float32)
    assert (mine.lm_head.weight is mine.model.embed_tokens.weight) == (added == 0)
    assert mine.all_tied_weights_keys == other.all_tied_weights_keys
    same(mine, other, torch.float32)


def test_a_weight_that_is_missing_is_drawn(alone: None, tmp_path: Path) -> None:
    """Fails if a weight that no file holds is left empty, or gets other random numbers than transformers gives it."""
    folder = change(tmp_path, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    torch.manual_seed(5)
    mine = load_for_training(settings("float32"), folder)
    torch.manual_seed(5)
    other = load_model(folder, torch.float32)
    assert mine.model.layers[1].mlp.up_proj.weight.std() > 0
    same(mine, other, torch.float32)


def test_a_weight_that_transformers_keeps_in_float32(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if it stays so, though DeepSpeed's engine gives all weights of a whole model the same dtype."""
    monkeypatch.setattr(Qwen3ForCausalLM, "_keep_in_fp32_modules_strict", {"norm"})
    folder = change(tmp_path, lambda weights: None)
    other = load_model(folder, torch.bfloat16)
    assert other.model.norm.weight.dtype == torch.float32
    same(load_for_training(settings("bfloat16"), folder), other, torch.bfloat16)


def test_adapters_on_a_partitioned_model(alone: None, tmp_path: Path) -> None:
    """Fails if adapters take their shapes or their random numbers from weights that are not there whole."""
    folder, lora = change(tmp_path, lambda weights: None), LoRAConfig(rank=2)
    assert isinstance(lora.adapters, AdapterSettings)
    mine, other = (
        with_adapters(model, lora, 1)
        for model in (load_for_training(settings("float32"), folder), load_model(folder, torch.float32))
    )
    expected = trained_line(other)  # type: ignore[arg-type]  # what it reads a model has too
    assert trained_line(mine) == expected  # type: ignore[arg-type]
    same(mine, other, torch.float32)


def test_a_resumed_run_reads_the_weights_of_its_checkpoint_alone(alone: None, tmp_path: Path) -> None:
    """Fails if the weights that RL started from are loaded before those of the checkpoint."""
    change(tmp_path / "hf", lambda weights: None)
    policy = load_policy(settings("float32"), "nowhere", tmp_path)
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert {name for name, weight in whole_parameters(policy) if torch.equal(weight, stored[name])} == stored.keys()


def test_a_transformers_that_marks_nothing_is_told(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Fails if a later transformers makes every rank load all weights without a word, or the model is then another."""
    monkeypatch.setattr(loading, "_LOADED", "_no_such_mark")
    folder = change(tmp_path, lambda weights: None)
    with caplog.at_level(logging.WARNING, "atpo_fast"):
        mine = load_for_training(settings("float32"), folder)
    assert "every rank has loaded all weights" in caplog.text
    same(mine, load_model(folder, torch.float32), torch.float32)
