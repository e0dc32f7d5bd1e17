"""Checkpoints: complete or absent, verified before they are used (docs/long_runs.md, docs/design.md#checkpoints).

    checkpoints/step_000050/hf/             weights, config, tokenizer: safetensors and JSON of Hugging Face
    checkpoints/step_000050/adapter/        LoRA adapters alone, as PEFT writes them, if any; hf/ has them merged
    checkpoints/step_000050/state/          moments and master weights in pieces, random numbers: safetensors
    checkpoints/step_000050/surplus.jsonl   trees that dynamic sampling has kept for the next step, if any
    checkpoints/step_000050/state.json      step, cursor, totals
    checkpoints/step_000050/manifest.json   SHA-256 of each of these; written last, so its presence means complete

Everything is written into a folder with a leading dot that is renamed when complete. What the manifest does not list is
never opened, and nothing is a pickle.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from atpo_fast.common.errors import CheckpointError
from atpo_fast.common.files import partial_path
from atpo_fast.common.manifest import (
    MANIFEST,
    DamagedError,
    Digest,
    check_files,
    files_below,
    read_manifest,
    settle,
    write_manifest,
)
from atpo_fast.engines.weight_stream import in_buckets
from atpo_fast.policy import Policy
from atpo_fast.train.optimizer_state import FOLDER, OptimizerState, StoredState
from atpo_fast.train.run import Run
from atpo_fast.train.weights import export_model, gather_adapters, gather_weights, write_adapters, write_model

_LOG = logging.getLogger(__name__)
_FILE_BYTES = 1 << 30  # of a file of optimizer state
_OF_FILES = ("ranks", "moments")  # what state.json says about the files beside it

Files = Callable[[Path], None]
"""Function that writes files into the folder that it is given."""


def checkpoint_folders(home: Path) -> list[Path]:
    """List the folders `home/checkpoints/step_N`, damaged ones too, oldest first."""
    return sorted(path for path in (home / "checkpoints").glob("step_*") if path.is_dir())


def newest_intact(run: Run, home: Path) -> Path | None:
    """Find the newest checkpoint of which every file is as it was written; None where there is no checkpoint at all.

    A damaged one is named in a warning, and the one before is looked at. A collective: every rank reads a share.

    Raises CheckpointError when there are checkpoints, and all are damaged.
    """
    damaged: list[str] = []
    for folder in reversed(checkpoint_folders(home)):
        reason = _damage(run, folder)
        if reason is None:
            return folder
        damaged.append(f"{folder.name}: {reason}")
        if run.is_main:
            _LOG.warning("CHECKPOINT DAMAGED: %s: %s; falling back to the one before", folder, reason)
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {home / 'checkpoints'} can be used ({'; '.join(damaged)}). Put intact files back, begin "
            "again with train.resume=never (the folder is kept under another name), or start another run_dir from "
            f"weights that are left, as model.path={checkpoint_folders(home)[-1] / 'hf'}"
        )
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the loop's own state in an intact checkpoint, with what it says about the files beside it."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return state


def load_checkpoint(run: Run, zero: deepspeed.DeepSpeedEngine, checkpoint: Path) -> dict[str, Any]:
    """Restore optimizer and random numbers of an engine over the weights in `checkpoint/hf`; returns the loop's state.

    The number of ranks and the ZeRO stage may be others than those that wrote it.

    Raises CheckpointError when the optimizer's state is of another model.
    """
    state = read_state(checkpoint)
    listed = [name for name in read_manifest(checkpoint) if name.startswith(f"{FOLDER}/")]
    pieces = [checkpoint / name for name in listed if "/rank_" in name]
    OptimizerState(zero).restore(StoredState(pieces), state["moments"])
    if f"{FOLDER}/{_random_file(run.rank)}" in listed:  # a rank more than there were goes on with its own
        _set_random_numbers(load_file(checkpoint / FOLDER / _random_file(run.rank)))
    if state["ranks"] != run.world and run.is_main:
        run.progress.message(f"{checkpoint} was written by {state['ranks']} ranks; {run.world} continue it")
    return {key: value for key, value in state.items() if key not in _OF_FILES}


@dataclass(slots=True)
class _Pending:
    """A checkpoint whose files are being written."""

    final: Path
    state: dict[str, Any]
    files: Future[dict[str, Digest]]


class Checkpoints:
    """The writer of the checkpoints of a run folder, or of its cold start.

    With `train.async_save` the files are written by a thread while training goes on; the checkpoint then appears at
    the first `settle` after the last rank has finished. Everything but the writing of files happens in the caller's
    thread, on all ranks together.
    """

    def __init__(self, run: Run, home: Path):
        self._run, self._home = run, home
        self._pool: ThreadPoolExecutor | None = None
        self._pending: _Pending | None = None

    def save(
        self, zero: deepspeed.DeepSpeedEngine, policy: Policy, state: dict[str, Any], more: Files | None = None
    ) -> None:
        """Write `checkpoints/step_N` of `state["step"]`, and delete old ones; a collective.

        `more` writes further files, on the main rank.

        Raises CheckpointError when the disk is full or not writable; earlier checkpoints stay as they were, and nothing
        of this one is left.
        """
        self.settle(wait=True)
        run, final = self._run, self._home / "checkpoints" / f"step_{state['step']:06d}"
        optimizer = OptimizerState(zero)
        described = state | {"ranks": run.world, "moments": optimizer.steps}
        partial, later = partial_path(final), run.config.train.async_save
        self._together(final, lambda: _begin(run, partial) if run.is_main else None)
        jobs = [self._model_files(policy, copied=later), _state_files(optimizer, run.rank, copied=later)]
        adapters = gather_adapters(policy, is_main=run.is_main)
        if run.is_main:
            jobs += [lambda folder: write_adapters(policy, adapters, folder / "adapter")] if adapters else []
            jobs += [more] if more is not None else []
        self._pending = _Pending(final, described, self._submit(partial, jobs, later))
        if not later:
            self.settle(wait=True)

    def _model_files(self, policy: Policy, *, copied: bool) -> Files:
        """Return what writes the model, on the main rank; `copied`: as it is now, else a collective to be done first.

        Every rank has to do it before anything that may fail on one of them alone.
        """
        run = self._run
        if not copied:
            return lambda folder: export_model(policy, run.task.tokenizer, folder / "hf", is_main=run.is_main)
        weights = gather_weights(policy, is_main=run.is_main)

        def write(folder: Path) -> None:
            if run.is_main:
                write_model(policy, run.task.tokenizer, weights.items(), folder / "hf")

        return write

    def settle(self, *, wait: bool) -> None:
        """Let a checkpoint appear whose files are written, on all ranks; `wait` for them or come back later.

        Raises CheckpointError as `save`.
        """
        pending, run = self._pending, self._run
        if pending is None or not (wait or run.all_of(pending.files.done())):
            return
        self._pending = None
        digests = run.gather([self._together(pending.final, pending.files.result)], run.world)
        written = {name: found for part in digests for name, found in part.items()}
        self._together(pending.final, lambda: self._publish(pending, written) if run.is_main else None)

    def _submit(self, partial: Path, jobs: list[Files], later: bool) -> Future[dict[str, Digest]]:
        if later:
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            return self._pool.submit(_write, partial, jobs, self._run.rank)
        done: Future[dict[str, Digest]] = Future()
        try:
            done.set_result(_write(partial, jobs, self._run.rank))
        except Exception as error:
            done.set_exception(error)
        return done

    def _publish(self, pending: _Pending, digests: dict[str, Digest]) -> None:
        """Complete the folder, give it its name, and delete what is not kept any longer."""
        partial = partial_path(pending.final)
        (partial / "state.json").write_text(json.dumps(pending.state, indent=1))
        write_manifest(partial, digests | {"state.json": settle(partial / "state.json")})
        shutil.rmtree(pending.final, ignore_errors=True)  # a damaged one
        partial.rename(pending.final)
        train = self._run.config.train
        for old in set(checkpoint_folders(self._home)) - kept(self._home, train.keep_checkpoints, train.keep_best):
            shutil.rmtree(old, ignore_errors=True)

    def _together(self, final: Path, action: Callable[[], Any]) -> Any:
        """Do a part of writing `final` on every rank; if it fails on one, remove all of it and raise on all of them."""
        run, error, result = self._run, None, None
        try:
            result = action()
        except Exception as failure:
            error = failure
        problems = run.gather([None if error is None else f"{type(error).__name__}: {error}"], run.world)
        problem = next((f"rank {i}: {text}" if i else text for i, text in enumerate(problems) if text), None)
        if problem is None:
            return result
        if run.is_main:
            shutil.rmtree(partial_path(final), ignore_errors=True)
        if error is not None and not isinstance(error, OSError | SafetensorError):
            raise error
        left = [folder for folder in checkpoint_folders(self._home) if (folder / MANIFEST).is_file()]
        newest = f"{left[-1]} is intact" if left else "there is no earlier one"
        raise CheckpointError(
            f"could not write {final} ({problem}); {newest}. Free space or choose another run_dir; the same command "
            "then continues from the newest checkpoint"
        ) from error


def kept(home: Path, newest: int, best: int) -> set[Path]:
    """Choose the checkpoints to keep: the newest, and those with the highest EM of the evaluation at their step."""
    folders = checkpoint_folders(home)
    scores = {folder: score for folder in folders if (score := _evaluated_em(folder)) is not None}
    ranked = sorted(scores, key=lambda folder: (scores[folder], folder.name), reverse=True)
    return {*folders[-newest:], *ranked[:best]}


def _evaluated_em(checkpoint: Path) -> float | None:
    try:
        state = read_state(checkpoint)
        return float(state["eval_em"]) if state["eval_step"] == state["step"] else None
    except (OSError, ValueError, KeyError, TypeError):  # damaged, of a cold start, or without evaluation
        return None


def _begin(run: Run, partial: Path) -> None:
    run.logger.settle()  # a checkpoint says that its steps are recorded
    for remains in partial.parent.glob(partial_path(partial.parent / "step_*").name):  # of killed runs
        shutil.rmtree(remains, ignore_errors=True)
    for name in ("hf", FOLDER):
        (partial / name).mkdir(parents=True)


def _state_files(optimizer: OptimizerState, rank: int, *, copied: bool) -> Files:
    """Return what writes this rank's optimizer state and random numbers; `copied`: as they are now."""
    random_numbers = _random_numbers()
    tensors: Iterator[tuple[str, Tensor]] = optimizer.tensors()
    if copied:
        tensors = iter([(name, values.to("cpu", copy=True)) for name, values in tensors])

    def write(folder: Path) -> None:
        save_file(random_numbers, folder / FOLDER / _random_file(rank))
        for number, bucket in enumerate(in_buckets(tensors, lambda named: named[1].nbytes, _FILE_BYTES)):
            own = {name: values.cpu().contiguous().clone() for name, values in bucket}
            save_file(own, folder / FOLDER / f"rank_{rank:05d}_{number:03d}.safetensors")

    return write


def _write(partial: Path, jobs: list[Files], rank: int) -> dict[str, Digest]:
    """Write files, and compute the digests of this rank's own: those of its state, on the main rank all the others."""
    for job in jobs:
        job(partial)
    return {str(path.relative_to(partial)): settle(path) for path in _own_files(partial, rank)}


def _own_files(partial: Path, rank: int) -> list[Path]:
    """List a rank's files. It looks at no others: the main rank moves the model's about while the rest are done."""
    state = partial / FOLDER
    own = [state / _random_file(rank), *state.glob(f"rank_{rank:05d}_*")]
    if rank == 0:
        beside = [path for path in partial.iterdir() if path != state]
        own += [file for path in beside for file in (files_below(path) if path.is_dir() else [path])]
    return own


def _random_file(rank: int) -> str:
    return f"random_{rank:05d}.safetensors"


def _random_numbers() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_numbers(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _damage(run: Run, folder: Path) -> str | None:
    """Say what is wrong with a checkpoint; every rank reads a share of its files, and all hear the same."""
    mine: str | None = None
    try:
        listed = read_manifest(folder)
        check_files(folder, listed, sorted(listed)[run.rank :: run.world])
        if "state.json" not in listed:
            raise DamagedError(f"{MANIFEST} does not list state.json")
    except DamagedError as error:
        mine = str(error)
    found = next((reason for reason in run.gather([mine], run.world) if reason is not None), None)
    if found is not None and (folder / "deepspeed").is_dir():
        found += "; it is of an earlier version, whose optimizer state is a pickle and is no longer read"
    return found
