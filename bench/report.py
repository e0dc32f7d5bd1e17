"""Write bench/results/RESULTS.md and the plots beside it from the records in bench/results/.

    python -m bench report [--results FOLDER] [--output FOLDER]

Nothing is measured here. Devices are never mixed: ratios are of one run on one device.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from bench.attention.report import SECTION as ATTENTION
from bench.attention.report import WINDOWS
from bench.cases import CPU_GOALS, EXPECTED, GPU_GOALS
from bench.core.records import RESULTS, read_records, slug
from bench.core.verdicts import Record, judge
from bench.head.report import SECTIONS as HEAD
from bench.packing.report import SECTION as PACKING
from bench.update.report import SECTIONS as UPDATE

_TREES = (*UPDATE, ATTENTION, WINDOWS, PACKING)
SECTIONS = (*_TREES, *HEAD)
_PREAMBLE = (
    "Peak memory is what torch's allocator held beyond the inputs, gradients included; scratch is without them. "
    "Errors are the largest (the mean) against float64 of the same rounded inputs: in nats for log-prob and entropy, "
    "relative to the largest (mean) true value for outputs and gradients. A is the number of tokens with loss. "
    "Matrix products: the one (without gradient) or three of the operator's size, plain, timed in the same rounds. "
    "Layers and updates: bounds are on how many times faster trees can be than flat rows, by tokens and by FLOPs "
    "(`bench/update/models.py`, `bench/update/measure.py`); MFU counts a forward and a backward, nothing twice, "
    "of the unique tokens, against the GPU's dense bfloat16 peak; effective MFU counts the flat tokens that they stand "
    "for, and may exceed 1."
)


def main(arguments: list[str] | None = None) -> None:
    """Write RESULTS.md and its plots from the records."""
    parser = argparse.ArgumentParser(
        prog="python -m bench report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of RESULTS.md and plots/")
    options = parser.parse_args(arguments)
    shown = {section.bench for section in SECTIONS}
    records = [record for record in read_records(options.results) if record.get("bench") in shown]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "RESULTS.md").write_text(report(records, options.output))
    print(f"{options.output / 'RESULTS.md'}: {len(records)} records")


def report(records: list[Record], output: Path) -> str:
    """Write the text of RESULTS.md, and draw the plots that it shows."""
    devices = by_device(records)
    lines = ["# Results", "", "Written by `python -m bench report` from the records beside it; not edited by hand.", ""]
    lines += must_show(devices)
    lines += [_PREAMBLE, ""]
    for device, found in devices.items():
        lines += [f"## {device}", "", versions(found), ""]
        for path in plots(device, found, output / "plots"):
            lines += [f"![{path.stem}](plots/{path.name})", ""]
        for section in SECTIONS:
            lines += section.lines([record for record in found if record["bench"] == section.bench])
    return "\n".join(lines).rstrip() + "\n"


def by_device(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Group records by their device, GPUs first."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["device"], []).append(record)
    return dict(sorted(found.items(), key=lambda item: (is_cpu(item[0]), item[0])))


def is_cpu(device: str) -> bool:
    """Say whether a record's device is a CPU."""
    return device.startswith("CPU")


def must_show(devices: dict[str, list[Record]]) -> list[str]:
    """Write a line for each goal on each device."""
    gpus = [device for device in devices if not is_cpu(device)]
    lines = ["## Must show", ""]
    if not gpus:
        lines += ["**No GPU record exists yet: nothing below was measured on a GPU.**", ""]
    lines += ["| goal | device | measured | |", "|---|---|---|---|"]
    for goals, names in ((GPU_GOALS, gpus or ["a GPU"]), (CPU_GOALS, [d for d in devices if is_cpu(d)] or ["a CPU"])):
        for name in names:
            for text, verdict in judge(goals, devices.get(name, [])).items():
                lines.append(f"| {text} | {name} | {verdict or '– | not measured'} |")
    if not gpus:
        lines += [
            "",
            "Where arithmetic says that a goal of a GPU will hardly be reached, the bar is what the best measured",
        ]
        lines += ["peer does:", "", *(f"* {goal}: {why}." for goal, why in EXPECTED.items())]
    return [*lines, ""]


def versions(records: list[Record]) -> str:
    """Write in one line what was measured."""
    found: dict[str, str] = {}
    for record in records:
        found |= {"torch": record["torch"]} | record["environment"]
        for name, entry in record["implementations"].items():
            own = (record["commit"], record["torch"])
            if "ms" in entry and entry["version"] not in own and name not in ("plain", "compiled", "published_loop"):
                found[name] = entry["version"]
    commits = ", ".join(sorted({record["commit"] for record in records}))
    clocks = "; ".join(sorted({record["clock"] for record in records}))
    return f"Commit {commits}; {', '.join(f'{n} {v}' for n, v in found.items())}. Times: {clocks}."


def plots(device: str, records: list[Record], folder: Path) -> list[Path]:
    """Draw the plots of one device and return their files."""
    from bench.core.plots import draw  # matplotlib is not needed to read this module
    from bench.head.plots import sweeps, times
    from bench.update.plots import draw_times

    trees, head = (
        [record for record in records if record["bench"] in [section.bench for section in sections]]
        for sections in (_TREES, HEAD)
    )
    figures = {"trees": lambda: draw_times(trees), "times": lambda: times(head), "sweeps": lambda: sweeps(head)}
    return draw(figures, folder, slug(device))
