"""Write bench/RESULTS.md and bench/plots/ from the records in bench/results/.

    python bench/report_results.py [--results FOLDER] [--output FOLDER]

Nothing is measured here. Devices are never mixed: ratios are of one run on one device.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from must_show import CPU_GOALS, GPU_GOALS, Record, judge, scratch_bytes
from records import RESULTS, read_records

HERE = Path(__file__).parent
OPERATORS = ("linear_turn_policy_loss", "linear_logprob", "turn_policy_loss")
MODES = {
    "forward": "without gradient",
    "gradient": "forward + backward",
    "entropy_gradient": "forward + backward through log-prob and entropy",
}


def by_device(records: Iterable[Record]) -> dict[str, list[Record]]:
    """GPUs first."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["device"], []).append(record)
    return dict(sorted(found.items(), key=lambda item: (is_cpu(item[0]), item[0])))


def is_cpu(device: str) -> bool:
    """Whether a record's device is a CPU."""
    return device.startswith("CPU")


def title(record: Record) -> str:
    """A case in words."""
    parts = [MODES[record["mode"]], " × ".join(map(str, record["shape"])), record["dtype"]]
    if record["bench"] == "turn_policy_loss":
        parts.append("packed" if len(record["shape"]) == 1 else "padded")
    else:
        parts.append("peaked logits" if record["peaked"] else "random logits")
    if record["loss_tokens"] != 1:
        parts.append(f"{record['loss_tokens']:.0%} of the tokens with loss")
    if record["clipped"]:
        parts.append(f"{record['clipped']:.0%} of the turns clipped")
    if record["turn_length"] != 64:
        parts.append(f"turns of {record['turn_length']}")
    return ", ".join(parts)


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


def case_table(record: Record) -> list[str]:
    """One case: an implementation a line."""
    times = record["implementations"]
    ours = times["ours"].get("ms", {}).get("p50")
    head = ["", "p50 ms (p20–p80)", "time / ours", "peak MB", "scratch MB", "largest (mean) error: log-prob"]
    head += ["entropy", "dX", "dW"]
    if "gemm_ms" in record:
        head[3:3] = ["TFLOP/s at " + " / ".join(next(iter(_flops(times)), ())), "of the matrix products"]
    else:
        head = [*head[:2], "device µs", *head[2:5], "largest (mean) error: gradient"]
    lines = [
        f"**{title(record)}** (commit {record['commit']})",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for name, entry in times.items():
        lines.append(f"| {' | '.join(_cells(name, entry, ours, 'gemm_ms' in record, len(head)))} |")
    return [*lines, ""]


def ratios(records: list[Record]) -> list[str]:
    """Every implementation's time over ours: a case a line."""
    measured = (n for r in records for n, entry in r["implementations"].items() if "ms" in entry and n != "ours")
    names = list(dict.fromkeys(measured))
    lines = [f"| time / ours | ours, ms | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for record in records:
        times = {n: e["ms"]["p50"] for n, e in record["implementations"].items() if "ms" in e}
        if "ours" in times:
            cells = [f"{times[n] / times['ours']:.2f}" if n in times else "" for n in names]
            lines.append(f"| {title(record)} | {_short(times['ours'])} | {' | '.join(cells)} |")
    return [*lines, ""]


def _flops(entries: dict[str, dict[str, Any]]) -> list[list[str]]:
    return [list(entry["tflops"]) for entry in entries.values() if "tflops" in entry]


def _cells(name: str, entry: dict[str, Any], ours: float | None, head: bool, width: int) -> list[str]:
    label = name if entry["same_work"] else f"{name} (less work)"
    if "ms" not in entry:
        why = "not installed" if "skipped" in entry else f"error: {entry.get('error')}".replace("|", "/")
        return [label, why, *[""] * (width - 2)]
    ms = entry["ms"]
    cells = [label, f"{_short(ms['p50'])} ({_short(ms['p20'])}–{_short(ms['p80'])})"]
    if not head:
        cells.append(f"{entry['device_ms'] * 1000:.1f}" if "device_ms" in entry else "–")
    cells.append(f"{ms['p50'] / ours:.2f}" if ours else "–")
    if head:
        cells.append(" / ".join(_short(x) for x in entry["tflops"].values()))
        cells.append(f"{entry['fraction_of_gemm']:.0%}")
    cells += [_short(entry["peak_bytes"] / 1e6), _short(scratch_bytes(entry) / 1e6)]
    for what in ("logprob", "entropy", "hidden_gradient", "weight_gradient") if head else ("gradient",):
        error = entry["errors"].get(what)
        cells.append("–" if error is None else f"{error['max']:.0e} ({error['mean']:.0e})")
    return cells


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def versions(records: list[Record]) -> str:
    """What was measured, in one line."""
    found: dict[str, str] = {}
    for record in records:
        found |= {"torch": record["torch"]} | record["environment"]
        for name, entry in record["implementations"].items():
            if "ms" in entry and name not in ("ours", "plain", "compiled", "published_loop"):
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
        "(without gradient) or three of the operator's size, plain, timed in the same rounds.",
        "",
    ]
    for device, found in devices.items():
        lines += [f"## {device}", "", versions(found), ""]
        for path in draw(device, found, output / "plots"):
            lines += [f"![{path.stem}](plots/{path.name})", ""]
        for operator in OPERATORS:
            of_operator = sorted((record for record in found if record["bench"] == operator), key=_order)
            if of_operator:
                lines += [f"### `{operator}`", "", *notes(of_operator), "", *ratios(of_operator)]
            for record in of_operator:
                lines += case_table(record)
    return "\n".join(lines).rstrip() + "\n"


def _order(record: Record) -> tuple[Any, ...]:
    """Large shapes first; sweeps after what they are compared with."""
    flops = torch.Size(record["shape"]).numel()
    sweep = (record["clipped"], -record["loss_tokens"], record["turn_length"] != 64, record["turn_length"])
    return (-flops, record["mode"], record["dtype"], record["peaked"], *sweep)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of RESULTS.md and plots/")
    options = parser.parse_args(arguments)
    records = [record for record in read_records(folder=options.results) if record["bench"] in OPERATORS]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "RESULTS.md").write_text(report(records, options.output))
    print(f"{options.output / 'RESULTS.md'}: {len(records)} records")


if __name__ == "__main__":
    main()
