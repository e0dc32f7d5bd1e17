"""Load the Hugging Face model behind the policy."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def load_model(path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal LM from a local Hugging Face folder.

    Raises FileNotFoundError when the path is not a model folder.
    """
    return AutoModelForCausalLM.from_pretrained(model_folder(path), dtype=dtype)


def model_folder(path: str | Path) -> str | Path:
    """Return a path that is a Hugging Face model folder. Raises FileNotFoundError when it is not."""
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"model.path={path}: no config.json there; give a Hugging Face model folder")
    return path
