"""Checkpoints: complete or absent, newest kept, each with a Hugging Face folder beside it (docs/design.md#checkpoints).

    checkpoints/step_000050/deepspeed/...   model, optimizer, as DeepSpeed writes them
    checkpoints/step_000050/hf/             safetensors, config, tokenizer; adapters are merged
    checkpoints/step_000050/adapter/        the adapters alone, as PEFT writes them, if there are any
    checkpoints/step_000050/surplus.jsonl   trees that dynamic sampling has kept for the next step, if any
    checkpoints/step_000050/state.json      step, cursor, totals; written last, so its presence means complete

Everything is written into a folder with a leading dot that is renamed when complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch

from atpo_fast.common.errors import CheckpointError
from atpo_fast.common.files import partial_path, replacing
from atpo_fast.policy import Policy
from atpo_fast.train.dynamic_sampling import write_surplus
from atpo_fast.train.run import Run
from atpo_fast.train.scoring import Group
from atpo_fast.train.weights import export_adapters, export_model


@dataclass(slots=True)
class TrainState:
    """The state of training that a checkpoint holds beside weights and optimizer."""

    step: int = 0  # number of steps done
    optimizer_steps: int = 0
    seconds: float = 0.0  # time spent so far, cold start included
    cold_start_em: float | None = None
    eval_em: float | None = None
    eval_step: int = -1  # step of the evaluation behind `eval_em`
    cursor: int = 0  # place of the next question in the order of questions (`atpo_fast.train.schedule.Draw`)
    kept: list[list[int]] = field(default_factory=list)  # surplus: (place, weights_step, trees) of each group
    totals: dict[str, float] = field(default_factory=dict)  # token counts since the start of RL

    def summary(self, seconds: float) -> dict[str, Any]:
        """Return the contents of `summary.json` for a training that took `seconds`."""
        totals = self.totals
        return {
            "cold_start_em": self.cold_start_em,
            "final_em": self.eval_em,
            "train_seconds": seconds,
            "steps": self.step,
            "optimizer_steps": self.optimizer_steps,
            "prefilled_tokens": int(totals.get("prefilled", 0)),
            "decoded_tokens": int(totals.get("decoded", 0)),
            "cache_hit_tokens": int(totals.get("cache_hit", 0)),
            "unique_tokens": int(totals.get("unique", 0)),
            "flat_tokens": int(totals.get("flat", 0)),
            "trained_tokens": int(totals.get("trained", 0)),
            "pruned_tokens": int(totals.get("pruned", 0)),
            "skipped_backward_tokens": int(totals.get("skipped_backward", 0)),
            "overlap": 1 - totals["unique"] / totals["flat"] if totals.get("flat") else 0.0,
        }


def complete_checkpoints(home: Path) -> list[Path]:
    """List the checkpoint folders below `home/checkpoints` that were written to the end, oldest first."""
    folder = home / "checkpoints"
    return sorted(p for p in folder.glob("step_*") if (p / "state.json").is_file()) if folder.is_dir() else []


def checkpoint_to_resume(run: Run) -> Path | None:
    """Find the checkpoint to resume from, if there is one and the configuration wants it.

    Raises FileNotFoundError under `train.resume=must` without a checkpoint, ValueError when nothing is left to train.
    """
    mode = run.config.train.resume
    found = complete_checkpoints(run.folder) if mode != "never" else []
    if not found:
        if mode == "must":
            raise FileNotFoundError(f"train.resume=must, but {run.folder}/checkpoints has no complete checkpoint")
        return None
    done = _read_state(found[-1])["step"]
    if done >= run.config.train.steps and (run.folder / "summary.json").is_file():
        raise ValueError(
            f"nothing left to train: {found[-1]} has finished step {done} of train.steps={run.config.train.steps}; "
            "raise train.steps, choose another run_dir, or set train.resume=never"
        )
    return found[-1]


def save_checkpoint(
    run: Run, zero: deepspeed.DeepSpeedEngine, policy: Policy, state: TrainState, surplus: Sequence[Group] = ()
) -> Path:
    """Write `checkpoints/step_N` of `state.step` and delete the oldest beyond `train.keep_checkpoints`.

    `surplus` are the groups that dynamic sampling has kept for the next step.

    Raises CheckpointError when the disk is full or not writable; earlier checkpoints stay as they were.
    """
    state.kept = [[group.place, group.weights_step, len(group.trees)] for group in surplus]

    def write(folder: Path) -> None:
        save_zero(zero, folder)
        export_model(policy, run.task.tokenizer, folder / "hf", is_main=run.is_main)
        export_adapters(policy, folder / "adapter", is_main=run.is_main)
        if run.is_main:
            write_surplus(folder, surplus)

    return write_checkpoint(run, run.folder, state.step, asdict(state), write)


def write_checkpoint(run: Run, home: Path, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Write `home/checkpoints/step_N`, complete or not at all, and delete the oldest beyond `train.keep_checkpoints`.

    `write` puts the contents into the folder that it is given, and every rank calls it; `state` goes beside them.

    Raises CheckpointError when the disk is full or not writable; earlier checkpoints stay as they were.
    """
    final = home / "checkpoints" / f"step_{step:06d}"
    try:
        with replacing(final) if run.is_main else nullcontext(partial_path(final)) as partial:
            if run.is_main:
                partial.mkdir()
            run.barrier()
            write(partial)
            run.barrier()
            if run.is_main:
                (partial / "state.json").write_text(json.dumps(state | {"ranks": run.world}, indent=1))
        if run.is_main:
            _delete_old(home, run.config.train.keep_checkpoints)
    except (OSError, RuntimeError) as error:
        kept = complete_checkpoints(home)
        newest = f"{kept[-1]} is intact" if kept else "there is no earlier one"
        raise CheckpointError(
            f"could not write {final}: {error}; {newest}. Free space or choose another run_dir; "
            "the same command then continues from the newest checkpoint"
        ) from error
    run.barrier()
    return final


def save_zero(zero: deepspeed.DeepSpeedEngine, checkpoint: Path) -> None:
    """Write weights, optimizer and random numbers into a checkpoint; every rank calls, and has its part of them.

    Weights that are not trained, below adapters, are those of the model that the run starts from, and are left out.
    """
    client = {"torch_rng": torch.get_rng_state()}
    where = str(checkpoint / "deepspeed")
    zero.save_checkpoint(where, tag="state", client_state=client, save_latest=False, exclude_frozen_parameters=True)


def load_checkpoint(run: Run, zero: deepspeed.DeepSpeedEngine, checkpoint: Path) -> TrainState:
    """Restore weights, optimizer and random numbers; returns the loop's state.

    Raises CheckpointError when it was written by another number of ranks, over which the optimizer is sharded.
    """
    state = load_zero(run, zero, checkpoint)
    state.setdefault("cursor", state["step"] * run.config.train.questions_per_step)  # written before there was one
    return TrainState(**state)


def load_zero(run: Run, zero: deepspeed.DeepSpeedEngine, checkpoint: Path) -> dict[str, Any]:
    """Restore weights, optimizer and random numbers; returns what else the checkpoint holds in its `state.json`.

    Raises CheckpointError when it was written by another number of ranks, over which the optimizer is sharded.
    """
    state = _read_state(checkpoint)
    if state.pop("ranks") != run.world:
        raise CheckpointError(
            f"{checkpoint} was written by another number of ranks than {run.world}; set ranks as before, or start a "
            f"new run_dir from its weights with model.path={checkpoint / 'hf'}"
        )
    everything = all(parameter.requires_grad for parameter in zero.module.parameters())
    path, client = zero.load_checkpoint(str(checkpoint / "deepspeed"), tag="state", load_module_strict=everything)
    if path is None:
        raise CheckpointError(
            f"{checkpoint}: DeepSpeed could not load it; delete the folder to fall back to the one before"
        )
    torch.set_rng_state(client["torch_rng"])
    return state


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the loop's own state in a checkpoint, with the number of ranks that wrote it."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return state


def _delete_old(home: Path, keep: int) -> None:
    for old in complete_checkpoints(home)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
