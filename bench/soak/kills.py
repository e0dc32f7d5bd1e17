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
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from atpo_fast.telemetry.run_logger import METRICS_FILE, read_metrics
from bench.core.records import RESULTS, device_name, write_record
from bench.soak.job import ROOT, Job

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
SHOWN = ("cold start", "rollout", "update", "eval")
_TIMES = ("time", "rate/", "cold_start/tokens_per_s")
_POLL_SECONDS = 0.005
_LIMIT_SECONDS = 1800.0


def main(arguments: list[str] | None = None) -> None:
    """Run both, compare them, and write the record."""
    options = _parse(arguments)
    folder: Path = options.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    unbroken, killed = folder / "unbroken", folder / "killed"
    unbroken.mkdir(parents=True)
    killed.mkdir()
    words = ["train", "--config", str(CONFIG), *SMALL, f"train.steps={options.steps}"]
    begun = time.monotonic()
    _finish(_start(words, unbroken))
    seconds = time.monotonic() - begun
    rng = random.Random(options.seed)
    kills = []
    for aimed, place in moments(options.kills, options.steps, rng):
        kills.append(_kill(_start(words, killed), killed / "run", aimed, place, rng.random(), seconds))
        print("killed in", kills[-1], flush=True)
    _finish(_start(words, killed))
    values, differing = compare(unbroken / "run", killed / "run")
    fields = {"ranks": 2, "steps": options.steps, "seed": options.seed, "kills": kills}
    device = device_name("cpu")
    write_record(
        "kills", "kills", "cpu", options.results, device=device, **fields, compared=values, differing=differing
    )
    print(f"{len(kills)} kills; {values}; differing: {differing or 'nothing'}")
    sys.exit(bool(differing))


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


def moments(kills: int, steps: int, rng: random.Random) -> list[tuple[str, int]]:
    """Draw where the kills fall: the phase, and how many steps are done by then; in the order in which they come."""
    found = [
        (phase, -1 if phase == "cold start" else rng.randrange(steps - 1)) for phase in islice(cycle(PHASES), kills)
    ]
    return sorted(found, key=lambda moment: moment[1])


def _start(words: list[str], home: Path) -> Job:
    return Job([*words, f"run_dir={home / 'run'}"], home / "run", home / "output")


def _finish(job: Job) -> None:
    """Wait for the end of a run, which has to be a good one."""
    while (code := job.code) is None:
        time.sleep(0.5)
    if code:
        sys.exit(f"the run ended with code {code}: {job.last_line()}; see {job.output}")


def _kill(job: Job, folder: Path, aimed: str, steps: int, share: float, seconds: float) -> dict[str, Any]:
    """Kill a run once it is where it is aimed at, and a drawn share of that phase later; returns where it was."""
    deadline = time.monotonic() + _LIMIT_SECONDS
    if aimed == "anywhere":
        time.sleep(share * seconds)
    else:
        while not _there(job, folder, aimed, steps):
            if job.code is not None or time.monotonic() > deadline:
                sys.exit(f"the run ended, or never came to {aimed} after step {steps}: {job.last_line()}")
            time.sleep(_POLL_SECONDS)
        time.sleep(share * _phase_seconds(folder, aimed))
    job.kill()
    saving = [path.name for path in folder.glob("**/checkpoints/.step_*")]
    return {"aimed": aimed, "shown": job.phase(), "step": job.step(), "half_written": saving}


def _there(job: Job, folder: Path, aimed: str, steps: int) -> bool:
    """Tell whether a run is in a phase, so many steps after its beginning or later."""
    if job.step() < steps:
        return False
    if aimed == "save":
        return any(folder.glob("checkpoints/.step_*"))
    return job.phase().startswith(aimed)


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
