"""Find the folder that holds the model of a checkpoint or a run: the one definition of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from atpo_fast.common.manifest import MANIFEST, DamagedError, check_files, read_manifest

ADAPTERS = "adapter_config.json"  # PEFT's name of the file beside adapters
_LOG = logging.getLogger(__name__)


def find_model(folder: Path) -> Path | None:
    """Find the Hugging Face folder of a checkpoint, of a run folder, or `folder` if it is one itself; None: none.

    The model of a run folder is that of its newest checkpoint, and before there is one that of its cold start. One that
    is not as its manifest says is named in a warning and passed over.
    """
    newest_first = sorted(folder.glob("checkpoints/step_*/hf"), reverse=True)
    candidates = (folder / "hf", *newest_first, folder / "cold_start", folder)
    return next((candidate for candidate in candidates if _holds_model(candidate) and _is_intact(candidate)), None)


def find_adapters(folder: Path) -> Path | None:
    """Find the folder of LoRA adapters as `find_model` finds that of a model; None where a checkpoint has none."""
    newest_first = sorted(folder.glob("checkpoints/step_*/adapter"), reverse=True)
    candidates = (folder / "adapter", *newest_first)
    return next((found for found in candidates if (found / ADAPTERS).is_file() and _is_intact(found)), None)


def model_to_use(run_folder: Path, given: str | None, overrides: Sequence[str]) -> tuple[Path, bool]:
    """Choose the model that a verb answers with: (its Hugging Face folder, whether it is the given one).

    It is `model.path` where that is given on the command line, else the run folder's newest model, else `model.path`.

    Raises FileNotFoundError when there is none of them.
    """
    asked_for = any(override.startswith("model.path=") for override in overrides)
    if given is not None and (asked_for or find_model(run_folder) is None):
        return Path(given), True
    return newest_model(run_folder), False


def newest_model(run_folder: Path) -> Path:
    """Return the Hugging Face folder of a run folder. Raises FileNotFoundError when it has none yet."""
    found = find_model(run_folder)
    if found is None:
        raise FileNotFoundError(f"{run_folder} has no trained model; set model.path or train first")
    return found


def _is_intact(model: Path) -> bool:
    """Tell whether the files of a checkpoint's model, or of its adapters, are those that the manifest names, if any."""
    checkpoint = model.parent
    if model.name not in ("hf", "adapter") or not (checkpoint / MANIFEST).is_file():
        return True
    try:
        listed = read_manifest(checkpoint)
        check_files(checkpoint, listed, [name for name in listed if name.startswith(f"{model.name}/")])
    except DamagedError as error:
        _LOG.warning("CHECKPOINT DAMAGED: %s: %s; its model is not used", checkpoint, error)
        return False
    return True


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
