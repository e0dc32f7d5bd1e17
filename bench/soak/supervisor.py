"""A training that is started again until it is done, as a launcher's loop does, while faults strike it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.soak.faults import ALL, END_OF_LIFE, Fault, Injector
from bench.soak.job import Job, Start, start_command
from bench.soak.watch import Sample, Watch

POLL_SECONDS = 0.2
HANG_SECONDS = 1800.0  # a step takes seconds; beyond this one nothing is waited for any longer
_STARTS_WITHOUT_A_STEP = 20


@dataclass
class Lived:
    """What a training went through."""

    faults: list[dict[str, Any]] = field(default_factory=list)
    """Step, kind and details of each fault that struck."""
    ends: list[dict[str, Any]] = field(default_factory=list)
    """Exit code, last step and last words of each of its lives."""
    left_over: list[str] = field(default_factory=list)
    """Processes that outlived one of its lives."""
    samples: list[Sample] = field(default_factory=list)


class EnduranceError(RuntimeError):
    """A training that hangs, or does not get any further however often it is started."""


class Supervisor:
    """A loop that starts a training until it ends well.

    Args:
        words: what follows `atpo-fast`.
        folder: the run folder.
        output: file for all that it writes.
        faults: the faults, in order of their steps.
        injector: brings them about.
        tell: is told each event, in a line.
        start: what starts the training.
    """

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        output: Path,
        faults: Sequence[Fault],
        injector: Injector,
        tell: Callable[[str], None] = print,
        start: Start = start_command,
    ):
        self._words, self._folder, self._output, self._start = words, folder, output, start
        self._waiting, self._injector, self._tell = list(faults), injector, tell
        self._lived, self._watch, self._furthest = Lived(), Watch(), 0

    def run(self) -> Lived:
        """Run to the end, and return what happened.

        Raises:
            EnduranceError: no step in half an hour, or in many starts.
        """
        fruitless = 0
        while True:
            before = self._furthest
            if self._live() == 0:
                break
            fruitless = 0 if self._furthest > before else fruitless + 1
            if fruitless >= _STARTS_WITHOUT_A_STEP:
                raise EnduranceError(f"{fruitless} starts without a new step; see {self._output}")
            time.sleep(1)
        self._injector.settle(ALL)
        self._lived.samples = self._watch.samples
        return self._lived

    def _live(self) -> int:
        """Start the training and follow it to the end of this life; returns its exit code."""
        job = Job(self._words, self._folder, self._output, self._start)
        self._watch.begin()
        last, since = "", time.monotonic()
        while (code := job.code) is None:
            time.sleep(POLL_SECONDS)
            step = job.step()
            self._furthest = max(self._furthest, step)
            server = self._injector.server
            self._watch.look(job, {} if server is None else {"server": server.process})
            self._injector.settle(step)
            if self._waiting and step and self._furthest >= self._waiting[0].step:
                self._strike(self._waiting.pop(0), job)
            said = job.last_line()
            if said != last:
                last, since = said, time.monotonic()
            elif time.monotonic() - since > HANG_SECONDS:
                job.kill()
                raise EnduranceError(f"nothing happens after: {last}; see {self._output}")
        self._injector.settle(END_OF_LIFE)
        self._lived.left_over += job.left()
        self._lived.ends.append({"code": code, "step": self._furthest, "said": job.last_line()})
        self._tell(f"ended with code {code} after step {self._furthest}: {job.last_line()[:160]}")
        return code

    def _strike(self, fault: Fault, job: Job) -> None:
        details = self._injector.inject(fault, job)
        self._lived.faults.append({**asdict(fault), "details": details})
        self._tell(f"step {self._furthest}: {fault.kind}, {details}")
