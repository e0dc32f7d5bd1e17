"""Memory, threads and handles of the processes of a training, step by step, and whether they grow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import psutil

from bench.soak.job import Job

WINDOW = 25  # steps
QUANTITIES = {"memory_mb": "resident memory, MB", "threads": "threads", "handles": "open files and sockets"}


@dataclass(frozen=True, slots=True)
class Sample:
    """What a process holds after a step."""

    process: str  # rank 0, rank 1, server
    life: int  # number of starts of the training before
    age: int  # number of steps of this life
    step: int
    memory_mb: float
    threads: int
    handles: int


class Watch:
    """The samples of a training over all of its lives."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._life, self._age, self._step = -1, 0, 0

    def begin(self) -> None:
        """Begin another life."""
        self._life, self._age, self._step = self._life + 1, 0, 0

    def look(self, job: Job, others: dict[str, psutil.Process]) -> None:
        """Take a sample of every rank, and of other processes, where a step has been done since the last time."""
        step = job.step()
        if step in (0, self._step):
            return
        self._age, self._step = self._age + 1, step
        named = {f"rank {number}": rank for number, rank in enumerate(job.ranks())} | others
        for name, process in named.items():
            with contextlib.suppress(psutil.Error), process.oneshot():
                held = process.memory_info().rss / 1e6, process.num_threads(), process.num_fds()
                if all(held):  # one that is ending holds nothing any more
                    self.samples.append(Sample(name, self._life, self._age, step, *held))


def growth(samples: Iterable[Sample], quantity: str, warm_up: int) -> dict[str, dict[str, float]]:
    """Fit a line over the steps to the floor of a quantity of each process.

    The floor is the lowest sample of each `WINDOW` steps: what is in use at the moment of a sample, such as a
    connection, is given back, and a leak is not. Samples of younger lives than `warm_up` steps are left out.

    Returns for each process the mean of the floor, and by how much the line rises from its first step to its last.
    """
    floors: dict[str, dict[int, float]] = {}
    for sample in samples:
        if sample.age > warm_up:
            floor, window = floors.setdefault(sample.process, {}), sample.step // WINDOW
            value = float(getattr(sample, quantity))
            floor[window] = min(value, floor.get(window, value))
    found = {}
    for process, floor in sorted(floors.items()):
        windows, values = np.array(sorted(floor.items())).T
        slope = np.polyfit(windows, values, 1)[0] if len(windows) > 1 else 0.0
        found[process] = {"mean": float(values.mean()), "rise": float(slope * np.ptp(windows))}
    return found


def thinned(samples: Sequence[Sample], every: int) -> list[dict[str, object]]:
    """Return the samples of every so many steps, as a record keeps them."""
    return [asdict(sample) for sample in samples if sample.step % every == 0]
