"""Weights to disk: in shards that Hugging Face reads, never the whole model in memory, and no rank is left waiting."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from atpo_fast.policy import Policy
from atpo_fast.train import weights
from atpo_fast.train.weights import export_model, whole_parameters, write_model
from bench.core.measure import peak_bytes
from tests.helpers.families import make
from tests.helpers.small_tokenizers import word_level

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, head_dim=8)


def policy(layers: int = 6, tied: bool = True) -> Policy:
    torch.manual_seed(0)
    config = Qwen3Config(num_hidden_layers=layers, num_key_value_heads=2, tie_word_embeddings=tied, **SIZES)
    return Policy(Qwen3ForCausalLM(config))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [1, 100_000, 1 << 30])
def test_shards_are_read_as_one_model(shard_bytes: int, tied: bool, tmp_path: Path) -> None:
    """Fails if a weight is lost between shards, the index is wrong, or a part's folder is left."""
    given = policy(tied=tied)
    write_model(given, word_level(), whole_parameters(given), tmp_path, shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 1 << 30) == (tmp_path / "model.safetensors.index.json").exists()
    assert not list(tmp_path.glob(".part*")) and (tmp_path / "tokenizer.json").exists()
    read = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    written = given.model.state_dict()
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in written.items())


def test_no_more_than_a_shard_is_held(tmp_path: Path) -> None:
    """Fails if weights are collected before they are written."""
    given = policy(layers=12)
    layer = sum(p.nbytes for p in given.model.model.layers[0].parameters())
    whole = sum(p.nbytes for p in given.parameters())
    _, peak = peak_bytes(lambda: write_model(given, word_level(), whole_parameters(given), tmp_path, layer), "cpu")
    assert peak < 4 * layer < whole / 3  # a shard of up to two layers, and what converts it


def test_experts_are_written_as_hugging_face_does(tmp_path: Path) -> None:
    """Fails if a shard cuts what an architecture stores joined, or the names are those in memory."""
    given = Policy(make("qwen3-moe"))
    given.model.save_pretrained(tmp_path / "whole")
    write_model(given, word_level(), whole_parameters(given), tmp_path / "parts", 1)
    with safe_open(tmp_path / "whole" / "model.safetensors", "pt") as whole:
        index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())["weight_map"]
        assert index.keys() == set(whole.keys())
        for name, file in index.items():
            with safe_open(tmp_path / "parts" / file, "pt") as part:
                assert torch.equal(part.get_tensor(name), whole.get_tensor(name))


def test_a_rank_that_cannot_write_goes_on_to_take_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the others would wait for ever in the next collective of a weight."""
    given, asked = policy(), []

    def counted(of: Policy) -> Iterator[tuple[str, Tensor]]:
        for named in whole_parameters(of):
            asked.append(named[0])
            yield named

    monkeypatch.setattr(weights, "whole_parameters", counted)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        export_model(given, word_level(), tmp_path / "file", is_main=True)
    assert asked == [name for name, _ in whole_parameters(given)]
