"""Runs stages one after the other, each in a process group of its own under its limit, and keeps what they find."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.core.case import STARTS, Case
from bench.gpu_day.archive import Archive
from bench.gpu_day.plan import Stage

ROOT = Path(__file__).resolve().parents[2]
POLL, GRACE = 0.2, 3.0  # seconds between looks at a stage, and from asking it to stop until it is killed
LEAST = 8.0  # seconds: with less left a stage is not started


class Clock:
    """The time of a session."""

    def now(self) -> float:
        """Return seconds since some moment."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def ended(self, stage: Stage) -> None:
        """Take note that a stage has ended."""


class RehearsalClock(Clock):
    """A clock of the plan: every stage takes its whole limit, however long it really takes here."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """Return the sum of the limits of the stages that have ended."""
        return self._now

    def ended(self, stage: Stage) -> None:
        """Let the whole limit of the stage pass."""
        self._now += stage.limit


@dataclass(frozen=True)
class Session:
    """What all stages of a session share."""

    archive: Archive
    summary: Callable[[list[Outcome]], str]
    say: Callable[[str], None]
    device: str = "cuda"
    small: bool = False
    """Rehearse: small shapes, on the CPU."""
    seconds: float | None = None
    """After which no stage goes on."""
    clock: Clock = field(default_factory=Clock)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended."""

    stage: Stage
    seconds: float
    result: str
    """"ok", or what went wrong."""
    last_line: str = ""


def run_stages(session: Session, stages: Sequence[Stage], outcomes: list[Outcome]) -> None:
    """Run the stages for which there is time, print a line for each, and keep the archive up to date.

    How they ended is appended to `outcomes`, where it is found also after a signal.
    """
    begun = session.clock.now()
    for at, stage in enumerate(stages, start=1):
        spent = session.clock.now() - begun
        left = float("inf") if session.seconds is None else session.seconds - spent
        if left < min(LEAST, stage.limit):
            outcome = Outcome(stage, 0.0, f"not started: {max(left, 0):.0f} s left")
        else:
            outcome = run_stage(session, replace(stage, limit=min(stage.limit, left)), outcomes)
        outcomes.append(outcome)
        used = f"{outcome.seconds:.0f} of {stage.limit:.0f} s"
        session.say(f"[{stage.call} {at}/{len(stages)}] {stage.name}: {outcome.result}, {used}. {outcome.last_line}")
        session.archive.renew(lambda: session.summary(outcomes), force=True)


def run_stage(session: Session, stage: Stage, before: list[Outcome]) -> Outcome:
    """Run a stage. Where its process breaks, the cases behind the one that broke it run in another process."""
    folder, begun = session.archive.stage_folder(stage.name), session.clock.now()
    rest, result = stage.cases, "ok"
    while True:
        left = stage.limit - (session.clock.now() - begun)
        status = _run_process(session, replace(stage, cases=rest, limit=left), folder, lambda: session.summary(before))
        if status == 0:
            break
        result = status if isinstance(status, str) else f"exit status {status}"
        rest = _behind(rest, _last_line(folder / "log.txt", STARTS))
        if isinstance(status, str) or not rest:
            break
    session.clock.ended(stage)
    return Outcome(stage, session.clock.now() - begun, result, _last_line(folder / "log.txt"))


def _behind(cases: tuple[Case, ...], line: str) -> tuple[Case, ...]:
    """Return the cases behind the one that a line says was being measured; none if it names none."""
    names = [case.name for case in cases]
    name = line.removeprefix(STARTS)
    return cases[names.index(name) + 1 :] if name in names else ()


def _run_process(session: Session, stage: Stage, folder: Path, summary: Callable[[], str]) -> int | str:
    """Run the process of a stage until it ends or its limit is reached; return its exit status, or why it was stopped.

    Its output goes into the stage's log. The archive is renewed whenever a record has been written.
    """
    begun = session.clock.now()
    with _log(folder) as log:
        process = subprocess.Popen(
            command(stage, session, folder),
            cwd=ROOT,
            env={**os.environ, **session.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all its children can be stopped with it
        )
        try:
            while process.poll() is None:
                if session.clock.now() - begun > stage.limit:
                    return "stopped at its limit"
                session.clock.sleep(POLL)
                session.archive.renew(summary)
        finally:
            _stop(process)
    return process.returncode


def _log(folder: Path) -> Any:
    """Open the log of a stage; where there is no room for one, its output is lost."""
    try:
        return (folder / "log.txt").open("a")
    except OSError:
        return open(os.devnull, "w")


def _stop(process: subprocess.Popen[Any]) -> None:
    """End a process and all its children, also those that it has left behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def command(stage: Stage, session: Session, folder: Path) -> list[str]:
    """Write the command of a stage that leaves its records in a folder."""
    python = [sys.executable, "-u"]
    where = ["--device", session.device, *(["--small"] if session.small else [])]
    if stage.kind == "cases":
        names = ",".join(case.name for case in stage.cases)
        chosen = ["--exact", "--cases", names, "--implementations", ",".join(stage.implementations)]
        samples = ["--seconds", str(0 if session.small else stage.seconds)]
        return [*python, "-m", "bench", *chosen, *samples, "--results", str(folder), *where]
    if stage.kind == "probe":
        name = stage.name.removesuffix("_b")
        return [*python, "-m", "bench.gpu_day.probes", name, "--results", str(folder), *where]
    if stage.kind == "example":
        few = ["--cold-start-steps", "1", "--steps", "1"] if session.small else []
        return [*python, *stage.arguments, "--device", session.device, *few]
    return [
        *python,
        "-m",
        "pytest",
        "-q",
        "--maxfail",
        "5",
        "-p",
        "no:cacheprovider",
        *_parallel(session),
        *stage.arguments,
    ]


def _parallel(session: Session) -> list[str]:
    """Choose pytest's options: many processes, since each compiles; in a rehearsal the tests are only collected."""
    if session.small:
        return ["--collect-only"]
    found = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    return found + (["--timeout", "60"] if find_spec("pytest_timeout") else [])


def stage_environment(wheels: Path) -> dict[str, str]:
    """Choose what stages find in their environment: paths, caches that they share, the commit where git is missing.

    Wheels in the folder are installed aside for them, without a network; what cannot be installed is done without.
    """
    scratch = Path(tempfile.gettempdir()) / "atpo_gpu_day"
    paths = [str(ROOT), str(ROOT / "kernels")]
    if any(wheels.glob("*.whl")):
        site = scratch / "site"
        install = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
        files = [str(path) for path in wheels.glob("*.whl")]
        subprocess.run([sys.executable, *install, "--upgrade", "--target", str(site), *files], check=False, timeout=60)
        paths.append(str(site))
    known = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": os.pathsep.join([*paths, *([known] if known else [])]),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
    }


def _last_line(log: Path, beginning: str = "") -> str:
    """Return the last line, of those with that beginning, that a stage has printed, cut to a readable length."""
    try:
        with log.open(errors="replace") as file:
            lines = [line.strip() for line in file if line.strip() and line.startswith(beginning)]
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""
