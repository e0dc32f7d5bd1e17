"""How long waiting OpenMP threads should spin: tokens/s of the cold start, quiet and beside busy processes.

    python -m bench threads [--repeats 3] [--steps 41] [--load 2] [--preload /path/to/libiomp5.so]

A thread that waits at the end of a parallel region first spins and then sleeps. Spinning saves the wake-up where the
cores are free, and takes the core from the thread that it waits for where they are not. Every setting runs in a process
of its own; settings take turns within a repeat, so that a machine whose speed drifts does not favour one. `--preload`
puts Intel's/LLVM's runtime in the place of GNU's. Writes bench/results/cpu/threads-RUNTIME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "cpu"
CLEARED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SETTINGS: dict[str, dict[str, dict[str, str]]] = {
    "gnu": {
        "default": {},
        "passive, 0": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
        **{str(count): {"GOMP_SPINCOUNT": str(count)} for count in (300, 3_000, 10_000, 30_000)},
    },
    "intel": {"default": {}, **{f"{time} ms": {"KMP_BLOCKTIME": str(time)} for time in (0, 1, 10)}},
}
"""Environment of each setting, by runtime."""

Speeds = dict[str, dict[str, list[float]]]


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep `count` processes busy on the cores that the measured one uses."""
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in load:
            process.kill()
            process.wait()


def tokens_per_second(setting: dict[str, str], steps: int, preload: str | None) -> float:
    """Return the median tokens/s of the cold start over its logged steps, without the first."""
    environment = {name: value for name, value in os.environ.items() if name not in CLEARED} | setting
    if preload is not None:
        environment["LD_PRELOAD"] = preload
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "atpo_fast", "cold-start", "--config", str(ROOT / "configs/quickstart.yaml")]
        options = [f"run_dir={folder}", f"cold_start.steps={steps}", "data.max_eval_questions=1"]
        options += ["world.demonstrations=500", "logging.progress=off"]
        subprocess.run([*command, *options], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([r["cold_start/tokens_per_s"] for r in records if "cold_start/tokens_per_s" in r][1:])


def measure(runtime: str, repeats: int, steps: int, load: int, preload: str | None) -> Speeds:
    """Measure tokens/s by load and setting, one entry a repeat."""
    speeds: Speeds = {name: {setting: [] for setting in SETTINGS[runtime]} for name in ("quiet", "loaded")}
    for _ in range(repeats):
        for name, busy in (("quiet", 0), ("loaded", load)):
            for setting, environment in SETTINGS[runtime].items():
                with busy_processes(busy):
                    speeds[name][setting].append(tokens_per_second(environment, steps, preload))
                print(f"{name:6} {setting:10} {speeds[name][setting][-1]:8.0f} tokens/s", flush=True)
    return speeds


def main(arguments: list[str]) -> None:
    """Measure, print the medians, write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m bench threads", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each setting")
    parser.add_argument("--steps", type=int, default=41, help="steps of each run")
    parser.add_argument("--load", type=int, default=2, help="busy processes of the loaded runs")
    parser.add_argument("--preload", help="shared library of Intel's/LLVM's OpenMP runtime to run under")
    chosen = parser.parse_args(arguments)
    runtime = "gnu" if chosen.preload is None else "intel"
    speeds = measure(runtime, chosen.repeats, chosen.steps, chosen.load, chosen.preload)
    medians = {name: {s: statistics.median(v) for s, v in by.items()} for name, by in speeds.items()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {"runtime": runtime, "cores": os.cpu_count(), "load": chosen.load, "median": medians, "all": speeds}
    (RESULTS / f"threads-{runtime}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(medians, indent=1))
