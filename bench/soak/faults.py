"""The faults of a soak, when they come, and how each is brought about from outside of the training."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from atpo_fast.common.manifest import MANIFEST
from bench.soak.job import Job
from bench.soak.search_server import SearchServer

KINDS = {
    "tools fail": "a share of the searches is refused, answered with nonsense, or not answered",
    "rank killed": "SIGKILL of one rank",
    "job killed": "SIGKILL of all processes at once",
    "disk full": "a file fills the file system of the run folder",
    "checkpoint corrupt": "64 bytes of a file of the newest checkpoint are flipped, then SIGKILL of all processes",
    "search dead": "SIGKILL of the search server, which is started again later",
}
END_OF_LIFE, SERVER_BACK, ALL = 1 << 28, 1 << 29, 1 << 30
"""Steps that no training reaches: its end in this life, the return of its search server, and what is after both."""
_FLIPPED = 64
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault, and the step whose record it follows."""

    step: int
    kind: str


def schedule(kinds: Sequence[str], times: int, steps: int, margin: int, rng: random.Random) -> list[Fault]:
    """Draw when each kind strikes so many times: after different steps, not the first or last `margin`."""
    chosen = rng.sample(range(margin, steps - margin), len(kinds) * times)
    struck = [kind for kind in kinds for _ in range(times)]
    rng.shuffle(struck)
    return sorted((Fault(*pair) for pair in zip(chosen, struck, strict=True)), key=lambda fault: fault.step)


class Injector:
    """What brings faults about, and ends those that last.

    Args:
        server: the search server of the training; none: its searches cannot fail.
        disk: folder on the run folder's file system, which nothing else uses.
        rng: draws what a fault leaves open: the rank, the file, how long it lasts.
        delay: a fault strikes at most so many seconds after the record of its step.
    """

    def __init__(self, server: SearchServer | None, disk: Path, rng: random.Random, delay: float = 2.0):
        self.server, self._disk, self._rng, self._delay = server, disk, rng, delay
        self._ends: list[tuple[float, int, Callable[[], object]]] = []  # time, step, what ends a fault that lasts

    def inject(self, fault: Fault, job: Job) -> str:
        """Bring a fault about; returns what was done, in words."""
        time.sleep(self._rng.uniform(0, self._delay))
        return {
            "tools fail": self._spoil,
            "rank killed": self._kill_rank,
            "job killed": self._kill_job,
            "disk full": self._fill,
            "checkpoint corrupt": self._corrupt,
            "search dead": self._kill_server,
        }[fault.kind](job)

    def settle(self, step: int) -> None:
        """End the faults whose time has come, by the clock or by the step that is done."""
        now = time.monotonic()
        due = [end for end in self._ends if now >= end[0] or step >= end[1]]
        self._ends = [end for end in self._ends if end not in due]
        for _, _, action in due:
            action()

    def _lasting(self, action: Callable[[], object], *, seconds: float, step: int) -> None:
        self._ends.append((time.monotonic() + seconds, step, action))

    def _spoil(self, job: Job) -> str:
        assert self.server is not None
        server = self.server
        share, steps = self._rng.uniform(0.2, 0.9), self._rng.randint(2, 8)
        server.spoil(share)
        self._lasting(lambda: server.spoil(0.0), seconds=600, step=job.step() + steps)
        return f"{share:.0%} of the searches fail for {steps} steps"

    def _kill_rank(self, job: Job) -> str:
        ranks = job.ranks()
        number = self._rng.randrange(max(1, len(ranks)))
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            ranks[number].kill()
        return f"rank {number}"

    def _kill_job(self, job: Job) -> str:
        job.kill()
        return "all processes"

    def _fill(self, job: Job) -> str:
        ballast, steps = self._disk / "ballast", self._rng.randint(1, 12)
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(_BLOCK)):
                pass
        self._lasting(lambda: ballast.unlink(missing_ok=True), seconds=600, step=job.step() + steps)
        return f"for {steps} steps, or until the training ends"

    def _corrupt(self, job: Job) -> str:
        job.kill()
        files = newest_checkpoint_files(job.folder)
        if not files:
            return "there is none yet"
        path = self._rng.choice(files)
        flip(path, self._rng.randrange(max(1, path.stat().st_size - _FLIPPED)))
        return str(path.relative_to(job.folder))

    def _kill_server(self, job: Job) -> str:
        assert self.server is not None
        seconds = self._rng.uniform(1, 30)
        self.server.kill()
        self._lasting(self.server.start, seconds=seconds, step=SERVER_BACK)
        return f"for {seconds:.0f} seconds"


def newest_checkpoint_files(folder: Path) -> list[Path]:
    """List the files of the newest complete checkpoint of a run; empty before the first."""
    for manifest in sorted((folder / "checkpoints").glob(f"step_*/{MANIFEST}"), reverse=True)[:1]:
        return sorted(path for path in manifest.parent.rglob("*") if path.is_file())
    return []


def flip(path: Path, begin: int) -> None:
    """Flip all bits of some bytes of a file, in place."""
    with path.open("r+b") as file:
        file.seek(begin)
        content = file.read(_FLIPPED)
        file.seek(begin)
        file.write(bytes(byte ^ 0xFF for byte in content))
