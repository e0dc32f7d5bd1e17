"""`atpo-fast export`: the Hugging Face files of a checkpoint, or its adapters, into a folder of their own."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from atpo_fast.commands.model_folder import find_adapters, find_model
from atpo_fast.commands.verb import Verb
from atpo_fast.common.files import replacing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments CHECKPOINT and TARGET."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or a run folder")
    parser.add_argument("target", metavar="TARGET", help="new or empty folder")
    parser.add_argument(
        "--adapters", action="store_true", help="the LoRA adapters alone, as PEFT reads them, not the merged model"
    )


def export(arguments: argparse.Namespace) -> int:
    """Copy the files; returns the exit code."""
    folder, target = Path(arguments.checkpoint), Path(arguments.target)
    source = find_adapters(folder) if arguments.adapters else find_model(folder)
    if source is None:
        what = "with adapters (model.lora)" if arguments.adapters else "(no safetensors found)"
        raise FileNotFoundError(f"{folder}: neither a checkpoint nor a run folder with one {what}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not an empty folder; choose another or remove it")
    with replacing(target) as partial:
        shutil.copytree(source, partial)
    print(f"{source} copied to {target}")
    return 0


EXPORT = Verb(
    name="export",
    summary="copy a checkpoint's Hugging Face files (safetensors, configuration, tokenizer)",
    detail="A run folder means its newest checkpoint. LoRA adapters are merged, unless --adapters asks for them alone.",
    example="atpo-fast export runs/quickstart/checkpoints/step_000040 models/mine",
    run=export,
    add_arguments=add_arguments,
)
