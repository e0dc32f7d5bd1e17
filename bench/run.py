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
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.cases import for_device
from bench.core.case import STARTS, Case
from bench.core.measure import clock, one_line, synchronize
from bench.core.records import RESULTS, device_name, environment, write_record

BROKEN = 70  # exit status
_SECONDS = {"cuda": 1.0, "cpu": 3.0}  # of samples per implementation


def main(arguments: list[str] | None = None) -> None:
    """Measure the chosen cases and write their records; exits with `BROKEN` where the GPU answers no more."""
    options = _parser().parse_args(arguments)
    cases = chosen(options)
    if options.list:
        print("\n".join(case.name for case in cases))
        return
    begun = time.perf_counter()
    for at, case in enumerate(cases):
        spent = time.perf_counter() - begun
        if options.budget is not None and spent > options.budget:
            print(f"budget of {options.budget:g} s spent: {len(cases) - at} cases not run")
            break
        print(f"{STARTS}{case.name}", flush=True)
        print(f"[{spent:.0f} s] {case.name}: {_measured(case, options)}", flush=True)
        try:
            synchronize(options.device)
        except Exception as error:  # after an illegal access every call fails: what is left needs another process
            print(f"the GPU answers no more: {one_line(error)}; {len(cases) - at - 1} cases not run", flush=True)
            sys.exit(BROKEN)


def chosen(options: argparse.Namespace) -> list[Case]:
    """Choose the cases that the options name, with their implementations."""
    parts, wanted = options.cases.split(","), options.implementations.split(",")
    cases = [
        case
        for case in for_device("cuda" if options.small else options.device)
        if (case.name in parts if options.exact else any(part in case.name for part in parts))
        and (case.quick or not options.quick)
    ]
    if wanted != [""]:
        cases = [replace(case, peers=tuple(name for name in case.peers if name in wanted)) for case in cases]
    return cases


def _measured(case: Case, options: argparse.Namespace) -> str:
    """Measure a case and write its record; return what is to be printed of it, an error as well as times."""
    try:
        record = run_case(case.small() if options.small else case, options.device, options.seconds)
        if options.small:
            record |= case.fields() | {"rehearsed": True}
    except Exception as error:
        return f"failed: {one_line(error)}"
    try:
        write_record(case.name, case.bench, options.device, options.results, **record)
    except OSError as error:
        return f"{_summary(record)} (not written: {error})"
    return _summary(record)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="", help="parts of names, separated by commas")
    parser.add_argument("--exact", action="store_true", help="--cases are whole names")
    parser.add_argument("--implementations", default="", help="peers to measure beside ours, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--quick", action="store_true", help="the must-show cases only")
    parser.add_argument("--small", action="store_true", help="rehearse a GPU's cases at small sizes on the CPU")
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
