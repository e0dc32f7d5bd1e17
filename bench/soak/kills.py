"""A training that is killed at random moments, ten times, against one that is not: equal to the last digit.

    python -m bench kills [--kills 10] [--steps 12] [--seed 0] [--folder runs/kills]

SIGKILL goes to all processes at once: inside the cold start, roll-outs, updates, saves and evaluations, the place
within each drawn from a seed, and at any time since a start. After the last kill the same command ends the run. All
metrics but times, the search trees, the answers of the evaluations, and every file of the checkpoints must be equal.
Writes bench/results/cpu/kills.json; ends with 1 where something differs.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from atpo_fast.telemetry.run_logger import METRICS_FILE, read_metrics
from bench.core.records import RESULTS, device_name, write_record
from bench.soak.job import ROOT, Job, Start, start_command

CONFIG = ROOT / "bench/soak/soak.yaml"
SMALL = (
    "tools.search_backend=bm25",
    "cold_start.steps=60",
    "cold_start.save_every=20",
    "train.save_every=2",
    "train.eval_every=4",
    "train.async_save=false",
    "train.max_mismatch_kl=1",
    "logging.progress=live",
)
PHASES = ("cold start", "rollout", "update", "save", "eval", "rollout", "update", "save", "anywhere", "cold start")
"""Where the kills fall, in turn; those in RL are sorted by their steps."""
_TIMES = ("time", "rate/", "cold_start/tokens_per_s")
_POLL_SECONDS = 0.005
_LIMIT_SECONDS = 1800.0


def main(arguments: list[str] | None = None) -> None:
    """Run both, compare them, and write the record."""
    options = _parse(arguments)
    folder: Path = options.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    words = ["train", "--config", str(CONFIG), *SMALL, f"train.steps={options.steps}"]
    found = kill_and_compare(words, folder, moments(options.kills, options.steps, random.Random(options.seed)))
    fields = {"ranks": 2, "steps": options.steps, "seed": options.seed, **found}
    write_record("kills", "kills", "cpu", options.results, device=device_name("cpu"), **fields)
    print(f"{len(found['kills'])} kills; {found['compared']}; differing: {found['differing'] or 'nothing'}")
    sys.exit(bool(found["differing"]))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="number of kills (default: 10)")
    parser.add_argument("--steps", type=int, default=12, help="steps of RL (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"), help="folder of both runs, made anew")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    return parser.parse_args(arguments)


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a kill falls: in a phase, after so many steps or later, and how far into the phase."""

    phase: str
    steps: int
    share: float


def moments(kills: int, steps: int, rng: random.Random) -> list[Moment]:
    """Draw where the kills fall, in the order in which they come."""
    found = [
        Moment(phase, -1 if phase == "cold start" else rng.randrange(steps - 1), rng.random())
        for phase in islice(cycle(PHASES), kills)
    ]
    return sorted(found, key=lambda moment: moment.steps)


def kill_and_compare(
    words: Sequence[str],
    folder: Path,
    kills: Sequence[Moment],
    start: Start = start_command,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run a command unbroken and killed, each in a folder of its own.

    Returns where the kills fell, how much was compared, and what differs. `words` have to ask for
    `logging.progress=live`, by which the phase is seen.
    """

    def run(name: str) -> Job:
        home = folder / name
        home.mkdir(parents=True, exist_ok=True)
        return Job([*words, f"run_dir={home / 'run'}"], home / "run", home / "output", start)

    begun = time.monotonic()
    _finish(run("unbroken"))
    seconds = time.monotonic() - begun
    fell = []
    for moment in kills:
        fell.append(_kill(run("killed"), moment, seconds))
        tell(f"killed: {fell[-1]}")
    _finish(run("killed"))
    compared, differing = compare(folder / "unbroken/run", folder / "killed/run")
    return {"kills": fell, "compared": compared, "differing": differing}


def _finish(job: Job) -> None:
    """Wait for the end of a run, which has to be a good one."""
    while (code := job.code) is None:
        time.sleep(0.5)
    if code:
        raise RuntimeError(f"the run ended with code {code}: {job.last_line()}; see {job.output}")


def _kill(job: Job, moment: Moment, seconds: float) -> dict[str, Any]:
    """Kill a run once it is where it is aimed at, and a share of that phase later; returns where it was.

    `seconds` is how long a run takes, for a kill that falls anywhere.
    """
    deadline = time.monotonic() + _LIMIT_SECONDS
    if moment.phase == "anywhere":
        time.sleep(moment.share * seconds)
    else:
        while not _there(job, moment):
            if job.code is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the run ended, or never came to {moment}: {job.last_line()}; see {job.output}")
            time.sleep(_POLL_SECONDS)
        time.sleep(moment.share * _phase_seconds(job.folder, moment.phase))
    job.kill()
    half = [path.name for path in job.folder.glob("**/checkpoints/.step_*")]
    return {"aimed": moment.phase, "shown": job.phase(), "step": job.step(), "half_written": half}


def _there(job: Job, moment: Moment) -> bool:
    """Tell whether a run has come to a moment."""
    if job.step() < moment.steps:
        return False
    if moment.phase == "save":
        return any(job.folder.glob("checkpoints/.step_*"))
    return job.phase().startswith(moment.phase)


def _phase_seconds(folder: Path, phase: str) -> float:
    """Return how long a phase took in the last step of this run; a tenth of a second before there is one."""
    key = {"rollout": "time/rollout", "update": "time/update", "save": "time/checkpoint"}.get(phase)
    path = folder / METRICS_FILE
    found = [record[key] for record in read_metrics(path) if key in record] if path.exists() else []
    return float(found[-1]) if found else 0.1


def compare(unbroken: Path, killed: Path) -> tuple[dict[str, int], list[str]]:
    """Compare two run folders: (how much was compared, what differs)."""
    expected, found = _values(unbroken), _values(killed)
    differing = [str(key) for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
    files = sorted(_files(unbroken) | _files(killed))
    differing += [name for name in files if not _same(unbroken / name, killed / name)]
    return {"values": len(expected), "files": len(files)}, sorted(differing)


def _values(folder: Path) -> dict[tuple[str, int, int, str], Any]:
    """Read all logged values but times, by phase, step, how many records of that step came before, and name."""
    found: dict[tuple[str, int, int, str], Any] = {}
    before: Counter[tuple[str, int]] = Counter()
    for record in read_metrics(folder / METRICS_FILE):
        phase, step = record.pop("phase"), record.pop("step")
        for name, value in record.items():
            if not name.startswith(_TIMES):
                # a number that is not finite as text, which equals itself
                found[phase, step, before[phase, step], name] = str(value) if value != value else value
        before[phase, step] += 1
    return found


def _files(folder: Path) -> set[str]:
    """Name the files that have to be equal byte for byte: trees, answers, and all tensors of checkpoints."""
    patterns = ("trees.jsonl", "eval/*", "**/*.safetensors")
    return {str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern)}


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.read_bytes() == other.read_bytes()


if __name__ == "__main__":
    main()
