"""Convert a GGUF file to a Hugging Face folder: weights in float32, configuration, tokenizer.

Transformers reads the file; three things it leaves wrong are mended here. Its configuration names the quantisation,
with which `save_pretrained` refuses; its tokenizer takes the wrong tokens for the ends of texts, where the file says
which they are; and the generation settings do not know the end of a turn.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from atpo_fast.common.errors import InputError, first_line
from atpo_fast.common.files import replacing

_CHECKED_TOKENS = 16  # greedy tokens that the converted model and the original have to agree on
_CHECK_PROMPT = "The capital of France is"
_NAMED_TOKENS = {"eos_token": "eos_token_id", "bos_token": "bos_token_id", "pad_token": "padding_token_id"}


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file to `folder` as safetensors, and check that it writes the same text greedily.

    The folder is there when everything is in it, or not at all.

    Raises:
        InputError: the packages that read such files are missing, the file is none, or its architecture is not
            supported; the message says which.
        RuntimeError: the converted model differs from the original.
    """
    reader = open_gguf(file)
    print(f"converting {file.name} to {folder} (once)", file=sys.stderr, flush=True)
    try:
        named_ids = _named_ids(reader)
        with redirect_stderr(StringIO()):  # progress bars
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            original = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except Exception as error:  # of three packages, of any kind
        raise InputError(
            f"{file}: this GGUF file cannot be converted: {first_line(error)}. Architectures that transformers reads "
            "from GGUF are supported (llama, qwen2, qwen3, gemma, ...); give a Hugging Face folder of the model instead"
        ) from error
    _name_tokens(tokenizer, named_ids)
    _forget_quantisation(original, tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as partial:
        original.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _check_equal(original, partial, tokenizer)


def open_gguf(file: Path) -> Any:
    """Open a GGUF file: its metadata and the shapes of its tensors, no weights.

    Raises InputError when the packages that read such files are missing, or the file is none.
    """
    try:
        import accelerate  # noqa: F401  transformers needs it
        from gguf import GGUFReader
    except ImportError:
        raise InputError(
            f"{file}: reading GGUF files needs two packages more: pip install 'atpo-fast[gguf]' (gguf, accelerate)"
        ) from None
    _check_magic(file)
    try:
        return GGUFReader(file)
    except Exception as error:  # a broken file breaks the reader in many ways
        raise InputError(f"{file}: a broken GGUF file: {first_line(error)}") from error


def _check_magic(file: Path) -> None:
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise InputError(f"{file}: not a GGUF file: it begins with {magic!r}, and b'GGUF' is expected")


def _named_ids(reader: Any) -> dict[str, int]:
    """Read which ids the file gives to the ends of texts and to padding."""
    ids = {}
    for token, key in _NAMED_TOKENS.items():
        field = reader.get_field(f"tokenizer.ggml.{key}")
        if field is not None:
            ids[token] = int(field.contents())
    return ids


def _name_tokens(tokenizer: PreTrainedTokenizerBase, named_ids: dict[str, int]) -> None:
    for token, number in named_ids.items():
        setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(number))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.clean_up_tokenization_spaces = False


def _forget_quantisation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the model one in plain float32, which may be saved, and whose turns end with the tokenizer's token."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    settings |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.config = type(model.config).from_dict(settings)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _check_equal(original: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare the written model with the original: what it writes greedily. Raise RuntimeError where it differs."""
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer(_CHECK_PROMPT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if not torch.equal(_greedy(original, prompt), _greedy(converted, prompt)):
        raise RuntimeError(f"{folder}: the converted model does not write what the GGUF file's model writes")


@torch.no_grad()
def _greedy(model: PreTrainedModel, prompt: Tensor) -> Tensor:  # (1, T) -> (1, T + new)
    """Continue a prompt greedily."""
    written: Tensor = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=_CHECKED_TOKENS, do_sample=False
    )
    return written
