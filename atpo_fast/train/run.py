"""What every stage of a run shares: ranks, device, folder, task, logging, and the wish to stop."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from atpo_fast.common.errors import StopRequested
from atpo_fast.common.files import free_name
from atpo_fast.common.ranks import reduce_over_ranks
from atpo_fast.config import Config, save_config
from atpo_fast.policy.model import fast_dtype, local_model
from atpo_fast.task import Task, load_task
from atpo_fast.telemetry import PhaseTimer, Progress, RunLogger
from atpo_fast.train.shared_files import check_shared_files
from atpo_fast.train.zero import join_process_group

T = TypeVar("T")


class StopSignal:
    """SIGINT, SIGTERM and SIGUSR1 as a flag that the loop reads between phases.

    A second SIGINT or SIGTERM ends the process at once. SIGUSR1 is what SLURM sends before the time limit
    (`--signal`), to every process that it knows of, so it may come twice.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number != signal.SIGUSR1:
            sys.exit(128 + number)
        if not self.requested:
            print("stopping: saving what is done first (signal again to stop at once)", file=sys.stderr, flush=True)
        self.requested = True

    def check(self) -> None:
        """Raise StopRequested when a signal has come."""
        if self.requested:
            raise StopRequested


@dataclass(slots=True)
class Run:
    """The state of a run in one of its processes.

    `config` says everything; `given` is the same before `auto` was decided and the model's folder found.
    """

    config: Config
    given: Config
    task: Task
    folder: Path
    rank: int
    world: int
    logger: RunLogger
    progress: Progress
    timer: PhaseTimer
    stop: StopSignal

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0, which writes the files."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Device on which this rank computes."""
        cuda = self.config.device != "cpu" and torch.cuda.is_available()
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    def share(self, items: Sequence[T]) -> list[T]:
        """Take this rank's items of a list that every rank holds."""
        return list(items[self.rank :: self.world])

    def gather(self, mine: Sequence[T], total: int) -> list[T]:
        """Undo `share`: give every rank the whole list, in order."""
        if self.world == 1:
            return list(mine)
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, list(mine))
        return [parts[i % self.world][i // self.world] for i in range(total)]

    def sum_over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        """Add up a dictionary of numbers that has the same keys on every rank."""
        total = reduce_over_ranks(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, total.tolist(), strict=True))

    def keep_config(self) -> None:
        """Write the given configuration into the run folder."""
        if self.is_main:
            save_config(self.given, self.folder / "config.yaml")

    def all_of(self, here: bool) -> bool:
        """Tell whether something holds on every rank; a collective."""
        return int(reduce_over_ranks(torch.tensor([int(not here)])).item()) == 0

    def stop_together(self) -> None:
        """Raise StopRequested on every rank when any was asked to stop; a collective."""
        if bool(reduce_over_ranks(torch.tensor([int(self.stop.requested)])).item()):
            raise StopRequested

    def barrier(self) -> None:
        """Wait until all ranks have come here."""
        if self.world > 1:
            dist.barrier()


def start_run(config: Config) -> Run:
    """Join the process group, load the task, and open the run folder."""
    cuda = config.device != "cpu" and torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ValueError("device=cuda, but torch sees no GPU; use device=cpu or device=auto")
    join_process_group(cuda=cuda)
    rank, world = dist.get_rank(), dist.get_world_size()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.manual_seed(config.seed)
    folder, given = Path(config.run_dir), config
    is_main = rank == 0
    if is_main:
        if config.train.resume == "never":
            _move_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
    config = with_local_model(with_dtype(config, cuda=cuda), folder, is_main=is_main)
    task = load_task(config)
    check_shared_files(config, task, folder)
    return Run(
        config=config,
        given=given,
        task=task,
        folder=folder,
        rank=rank,
        world=world,
        logger=RunLogger(folder, config, is_main=is_main),
        progress=Progress(config.logging.progress, is_main=is_main),
        timer=PhaseTimer(),
        stop=StopSignal(),
    )


def with_dtype(config: Config, *, cuda: bool) -> Config:
    """Return the configuration with a `model.dtype` that is no longer `auto`."""
    if config.model.dtype != "auto":
        return config
    return replace(config, model=replace(config.model, dtype=fast_dtype(cuda=cuda)))


def with_local_model(config: Config, folder: Path, *, is_main: bool) -> Config:
    """Return the configuration with `model.path` as a folder of this machine; rank 0 converts where that is needed.

    Raises what `local_model` raises.
    """
    model = config.model

    def find() -> Path | None:
        return None if model.path is None else local_model(model.path, model.package, folder / "model")

    path = find() if is_main else None
    if dist.get_world_size() > 1:
        dist.barrier()
    path = path or find()
    return config if path is None else replace(config, model=replace(model, path=str(path), package=None))


def _move_aside(folder: Path) -> None:
    """Rename an earlier run's folder, so that a fresh start neither mixes with it nor destroys it."""
    if not (folder / "checkpoints").is_dir():
        return
    folder.rename(free_name(folder))
