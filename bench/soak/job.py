"""A training as a user's launcher starts it: its processes, what it shows, and its end."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import psutil

ROOT = Path(__file__).resolve().parents[2]
_TAIL_BYTES = 1 << 16
_PHASE = re.compile(rb"(cold start|rollout|update|eval) +[\d,]+/[\d,]+")
_STEP = re.compile(rb"step (\d+)/\d+  ")


class Process(Protocol):
    """What a job needs of the process of its command; `subprocess.Popen` is one."""

    @property
    def pid(self) -> int:
        """Id of the process."""
        ...

    def poll(self) -> int | None:
        """Return its exit code; None while it runs."""
        ...


Start = Callable[[Sequence[str], Path], Process]
"""Function that starts `atpo-fast` with some words, its output appended to a file."""


def start_command(words: Sequence[str], output: Path) -> Process:
    """Start `python -m atpo_fast`, as a user's shell does."""
    with output.open("ab") as file:
        command = [sys.executable, "-m", "atpo_fast", *words]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)


class Job:
    """One life of a training, from its start to its end.

    Args:
        words: what follows `atpo-fast`.
        folder: the run folder.
        output: file to which its output is appended.
        start: what starts it.
    """

    def __init__(self, words: Sequence[str], folder: Path, output: Path, start: Start = start_command):
        self.folder, self.output = folder, output
        self._from = output.stat().st_size if output.exists() else 0
        self._process = start(words, output)
        self._seen: dict[int, psutil.Process] = {}  # every process that was ever seen of it

    @property
    def code(self) -> int | None:
        """Exit code; minus the signal that ended it; None while it runs."""
        return self._process.poll()

    def ranks(self) -> list[psutil.Process]:
        """Find its ranks, in order: the children of the child of the command."""
        with contextlib.suppress(psutil.NoSuchProcess):
            command = psutil.Process(self._process.pid)
            self._see(command, *command.children(recursive=True))
            ranks = [rank for launcher in command.children() for rank in launcher.children()]
            return sorted(ranks, key=lambda rank: (rank.create_time(), rank.pid))
        return []

    def kill(self) -> None:
        """End all of its processes at once, as a power cut would: SIGKILL, and none has time to see another end."""
        self.ranks()
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in self._seen.values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        while self.code is None:
            time.sleep(0.01)

    def left(self, patience: float = 20.0) -> list[str]:
        """Name the processes that outlive it by more than some seconds."""
        _, alive = psutil.wait_procs(list(self._seen.values()), timeout=patience)
        return [str(process) for process in alive if process.status() != psutil.STATUS_ZOMBIE]

    def last_line(self) -> str:
        """Return the last line with something on it that it has written."""
        lines = _tail(self.output, self._from).decode(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def phase(self) -> str:
        """Return the phase that the display has shown last (`logging.progress=live`); nothing before the first."""
        found = _PHASE.findall(_tail(self.output, self._from))
        return found[-1].decode() if found else ""

    def step(self) -> int:
        """Return the last step of RL that it has shown; 0 before the first."""
        found = _STEP.findall(_tail(self.output, self._from))
        return int(found[-1]) if found else 0

    def _see(self, *processes: psutil.Process) -> None:
        self._seen |= {process.pid: process for process in processes}


def _tail(path: Path, begin: int) -> bytes:
    """Read the end of a file, of what comes after `begin`."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(begin, size - _TAIL_BYTES))
        return file.read()
