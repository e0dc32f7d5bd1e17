"""Measure operators, layers and whole updates side by side with their peers: a record for each case in bench/results/.

    python -m bench                         every case of this machine (a GPU where there is one), must-show cases first
    python -m bench --quick                 the must-show cases only
    python -m bench --cases turn_policy_loss,clipped       cases whose name has one of these in it
    python -m bench --list                  print the names

Other commands: report, resources, quickstart-seeds, streaming, retrieval (`python -m bench report --help`).

Needs torch, transformers and numpy, and triton on a GPU; peers that are not installed are skipped by name.
`python -m bench report` makes tables and plots of the records.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from bench.cases import for_device
from bench.core.case import Case
from bench.core.measure import clock, synchronize
from bench.core.records import RESULTS, device_name, environment, write_record

_SECONDS = {"cuda": 1.0, "cpu": 3.0}  # of samples per implementation


def main(arguments: list[str] | None = None) -> None:
    """Measure the chosen cases and write their records."""
    options = _parser().parse_args(arguments)
    parts = options.cases.split(",")
    chosen = [
        case
        for case in for_device(options.device)
        if any(part in case.name for part in parts) and (case.quick or not options.quick)
    ]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return
    begun = time.perf_counter()
    for at, case in enumerate(chosen):
        spent = time.perf_counter() - begun
        if options.budget is not None and spent > options.budget:
            print(f"budget of {options.budget:g} s spent: {len(chosen) - at} cases not run")
            break
        record = run_case(case, options.device, options.seconds)
        write_record(case.name, case.bench, options.device, options.results, **record)
        synchronize(options.device)
        print(f"[{spent:.0f} s] {case.name}: {_summary(record)}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="", help="parts of names, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--quick", action="store_true", help="the must-show cases only")
    parser.add_argument("--budget", type=float, help="seconds after which no further case is started")
    parser.add_argument("--seconds", type=float, help="seconds of samples per implementation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    return parser


def run_case(case: Case, device: str, seconds: float | None = None) -> dict[str, Any]:
    """Measure a case and return the fields of its record."""
    measured = case.measure(device, _SECONDS[device] if seconds is None else seconds)
    about = {"device": device_name(device), "environment": environment(), "clock": clock(device)}
    return case.fields() | about | measured


def _summary(record: dict[str, Any]) -> str:
    def entry(name: str, found: dict[str, Any]) -> str:
        if "ms" not in found:
            return f"{name} {found.get('skipped') or found.get('error')}"
        return f"{name} {found['ms']['p50']:.3f} ms"

    return "; ".join(entry(name, found) for name, found in record["implementations"].items())
