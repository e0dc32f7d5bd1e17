"""A quickstart with several seeds (of the run and of its world): EM before and after RL.

    python -m bench quickstart-seeds [--config configs/rooms.yaml] [SEED ...]        default 0 1 2

Trains into runs/NAME_seedN, writes the record `NAME_seeds` in bench/results/ and prints its table. CPU seconds are of
all processes of a run, and depend less on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.core.records import RESULTS, write_record

ROOT = Path(__file__).resolve().parents[2]
KEYS = (
    "cold_start_em",
    "final_em",
    "train_seconds",
    "steps",
    "prefilled_tokens",
    "unique_tokens",
    "overlap",
    "random_guess_rate",
)


def run(config: Path, seed: int) -> dict[str, Any]:
    """Train from nothing with a seed and return what the run's summary says."""
    folder = ROOT / "runs" / f"{config.stem}_seed{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "atpo_fast", "train", "--config", str(config)]
    seeds = [f"{name}={seed}" for name in ("seed", "world.seed", "rooms.seed")]
    before = _cpu_seconds()
    subprocess.run([*command, *seeds, f"run_dir={folder}"], check=True, cwd=ROOT)
    used = round(_cpu_seconds() - before, 1)
    summary = json.loads((folder / "summary.json").read_text())
    return {"seed": seed, "cpu_seconds": used, **{key: summary[key] for key in KEYS if key in summary}}


def _cpu_seconds() -> float:
    """Return the CPU time of the processes that have ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(runs: list[dict[str, Any]]) -> str:
    """Write a line for each seed, in Markdown."""
    lines = [
        "| seed | EM after cold start | EM after RL | seconds | CPU seconds | unique tokens | overlap |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['seed']} | {r['cold_start_em']:.3f} | {r['final_em']:.3f} | {r['train_seconds']:.0f} | "
        f"{r['cpu_seconds']:.0f} | {r['unique_tokens']:,} | {r['overlap']:.2f} |"
        for r in runs
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run a quickstart for each seed and write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m bench quickstart-seeds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml", metavar="FILE")
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args(arguments)
    runs = [run(options.config, seed) for seed in options.seeds]
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.cuda.get_device_name() if kind == "cuda" else f"CPU, {os.cpu_count()} cores"
    name = f"{options.config.stem}_seeds"
    write_record(name, "quickstart_seeds", kind, options.results, device=device, runs=runs)
    print(table(runs))
