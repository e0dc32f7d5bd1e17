"""The quickstart with several seeds (of the run and of the world): EM before and after RL.

    python -m bench quickstart-seeds [SEED ...]        default 0 1 2

Writes the record `quickstart_seeds` in bench/results/ and prints the README's table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.core.records import write_record

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


def run(seed: int) -> dict[str, Any]:
    """Train from nothing with a seed and return what the run's summary says."""
    folder = ROOT / "runs" / f"quickstart_seed{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "atpo_fast", "train", "--config", str(ROOT / "configs/quickstart.yaml")]
    subprocess.run([*command, f"seed={seed}", f"world.seed={seed}", f"run_dir={folder}"], check=True, cwd=ROOT)
    summary = json.loads((folder / "summary.json").read_text())
    return {"seed": seed, **{key: summary[key] for key in KEYS}}


def table(runs: list[dict[str, Any]]) -> str:
    """Write a line for each seed, in Markdown."""
    lines = [
        "| seed | EM after cold start | EM after RL | seconds | unique tokens | overlap |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['seed']} | {r['cold_start_em']:.3f} | {r['final_em']:.3f} | {r['train_seconds']:.0f} | "
        f"{r['unique_tokens']:,} | {r['overlap']:.2f} |"
        for r in runs
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the quickstart for each seed and write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m bench quickstart-seeds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2], metavar="SEED")
    runs = [run(seed) for seed in parser.parse_args(arguments).seeds]
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.cuda.get_device_name() if kind == "cuda" else f"CPU, {os.cpu_count()} cores"
    write_record("quickstart_seeds", "quickstart_seeds", kind, device=device, runs=runs)
    print(table(runs))
