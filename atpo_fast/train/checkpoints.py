"""Checkpoints: complete or absent, newest kept, each with a Hugging Face folder beside it (design, section 8).

    checkpoints/step_000050/deepspeed/...   model, optimizer, as DeepSpeed writes them
    checkpoints/step_000050/hf/             safetensors, config, tokenizer
    checkpoints/step_000050/state.json      step, cursor, totals; written last, so its presence means complete

Everything is written into a folder with a leading dot that is renamed when complete.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch

from atpo_fast.policy import Policy
from atpo_fast.train.run import Run
from atpo_fast.train.weights import export_model


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what to do."""


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """Checkpoint folders that were written to the end, oldest first."""
    folder = run_folder / "checkpoints"
    return sorted(p for p in folder.glob("step_*") if (p / "state.json").is_file()) if folder.is_dir() else []


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The loop's own state in a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return state


def save_checkpoint(run: Run, engine: deepspeed.DeepSpeedEngine, policy: Policy, state: dict[str, Any]) -> Path:
    """Write `checkpoints/step_N` for `state["step"]` and delete the oldest beyond `train.keep_checkpoints`.

    Raises CheckpointError when the disk is full or not writable; earlier checkpoints stay as they were.
    """
    final = run.folder / "checkpoints" / f"step_{state['step']:06d}"
    partial = final.with_name("." + final.name)
    try:
        if run.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        run.barrier()
        client = {"torch_rng": torch.get_rng_state()}
        engine.save_checkpoint(str(partial / "deepspeed"), tag="state", client_state=client, save_latest=False)
        export_model(policy, run.task.tokenizer, partial / "hf", is_main=run.is_main)
        run.barrier()
        if run.is_main:
            (partial / "state.json").write_text(json.dumps(state | {"ranks": run.world}, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _delete_old(run.folder, run.config.train.keep_checkpoints)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = complete_checkpoints(run.folder)
        newest = f"{kept[-1]} is intact" if kept else "there is no earlier one"
        raise CheckpointError(
            f"could not write {final}: {error}; {newest}. Free space or choose another run_dir; "
            "the same command then continues from the newest checkpoint"
        ) from error
    run.barrier()
    return final


def load_checkpoint(run: Run, engine: deepspeed.DeepSpeedEngine, checkpoint: Path) -> dict[str, Any]:
    """Restore weights, optimizer and RNG; returns the loop's state.

    Raises CheckpointError when it was written by another number of ranks, over which the optimizer is sharded.
    """
    state = read_state(checkpoint)
    if state.pop("ranks") != run.world:
        raise CheckpointError(
            f"{checkpoint} was written by another number of ranks than {run.world}; set ranks as before, or start a "
            f"new run_dir from its weights with model.path={checkpoint / 'hf'}"
        )
    path, client = engine.load_checkpoint(str(checkpoint / "deepspeed"), tag="state")
    if path is None:
        raise CheckpointError(
            f"{checkpoint}: DeepSpeed could not load it; delete the folder to fall back to the one before"
        )
    torch.set_rng_state(client["torch_rng"])
    return state


def _delete_old(run_folder: Path, keep: int) -> None:
    for old in complete_checkpoints(run_folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
