"""Write bench/RESULTS.md and bench/plots/ from the records in bench/results/.

    python bench/report_results.py [--results FOLDER] [--output FOLDER]

Nothing is measured here. Devices are never mixed: ratios are of one run on one device.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import head_report
import tree_report
from must_show import CPU_GOALS, GPU_GOALS
from records import RESULTS, read_records
from verdicts import Record, judge

HERE = Path(__file__).parent
BENCHES = (*tree_report.BENCHES, *head_report.BENCHES)


def by_device(records: Iterable[Record]) -> dict[str, list[Record]]:
    """GPUs first."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["device"], []).append(record)
    return dict(sorted(found.items(), key=lambda item: (is_cpu(item[0]), item[0])))


def is_cpu(device: str) -> bool:
    """Whether a record's device is a CPU."""
    return device.startswith("CPU")


def must_show(devices: dict[str, list[Record]]) -> list[str]:
    """A line per goal and device."""
    gpus = [device for device in devices if not is_cpu(device)]
    lines = ["## Must show", ""]
    if not gpus:
        lines += ["**No GPU record exists yet: nothing below was measured on a GPU.**", ""]
    lines += ["| goal | device | measured | |", "|---|---|---|---|"]
    for goals, names in ((GPU_GOALS, gpus or ["a GPU"]), (CPU_GOALS, [d for d in devices if is_cpu(d)] or ["a CPU"])):
        for name in names:
            for text, verdict in judge(goals, devices.get(name, [])).items():
                lines.append(f"| {text} | {name} | {verdict or '– | not measured'} |")
    return [*lines, ""]


def versions(records: list[Record]) -> str:
    """What was measured, in one line."""
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


def notes(records: list[Record]) -> list[str]:
    """What peers do otherwise."""
    found = {name: e["note"] for record in records for name, e in record["implementations"].items() if e["note"]}
    return [f"* `{name}`: {note}." for name, note in found.items()]


def report(records: list[Record], output: Path) -> str:
    """RESULTS.md; draws the plots that it shows."""
    from plots import draw  # matplotlib is not needed to read this module

    devices = by_device(records)
    lines = ["# Results", "", "Written by `report_results.py` from the records in `results/`; not edited by hand.", ""]
    lines += must_show(devices)
    lines += [
        "Peak memory is what torch's allocator held beyond the inputs, gradients included; scratch is without them. "
        "Errors are against float64 of the same rounded inputs: in nats for log-prob and entropy, relative to the "
        "largest (mean) true value for gradients. A is the number of tokens with loss. Matrix products: the one "
        "(without gradient) or three of the operator's size, plain, timed in the same rounds. Layers and updates: "
        "bounds are on how many times faster trees can be than flat rows, by tokens and by FLOPs (`models.py`, "
        "`model_runs.py`); MFU counts a forward and a backward, nothing twice, against the GPU's dense bfloat16 peak.",
        "",
    ]
    for device, found in devices.items():
        lines += [f"## {device}", "", versions(found), ""]
        for path in draw(device, found, output / "plots"):
            lines += [f"![{path.stem}](plots/{path.name})", ""]
        for bench in BENCHES:
            lines += _section(bench, [record for record in found if record["bench"] == bench])
    return "\n".join(lines).rstrip() + "\n"


def _section(bench: str, records: list[Record]) -> list[str]:
    """All that is known of one kind of bench."""
    if not records:
        return []
    tree = bench in tree_report.BENCHES
    records = sorted(records, key=tree_report.order if tree else head_report.order)
    lines = [f"### `{bench}`", "", *notes(records), ""]
    if not tree:
        lines += head_report.ratios(records)
    elif "bounds" in records[0]:
        lines += tree_report.bounds_table(records)
    table = tree_report.case_table if tree else head_report.case_table
    return lines + [line for record in records for line in table(record)]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of RESULTS.md and plots/")
    options = parser.parse_args(arguments)
    records = [record for record in read_records(folder=options.results) if record["bench"] in BENCHES]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "RESULTS.md").write_text(report(records, options.output))
    print(f"{options.output / 'RESULTS.md'}: {len(records)} records")


if __name__ == "__main__":
    main()
