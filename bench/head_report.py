"""Tables of the head operators."""

from __future__ import annotations

from typing import Any

import torch
from verdicts import Record, scratch_bytes

BENCHES = ("linear_turn_policy_loss", "linear_logprob", "turn_policy_loss")
MODES = {
    "forward": "without gradient",
    "gradient": "forward + backward",
    "entropy_gradient": "forward + backward through log-prob and entropy",
}


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


def order(record: Record) -> tuple[Any, ...]:
    """For sorting. Large shapes first; sweeps after what they are compared with."""
    flops = torch.Size(record["shape"]).numel()
    sweep = (record["clipped"], -record["loss_tokens"], record["turn_length"] != 64, record["turn_length"])
    return (-flops, record["mode"], record["dtype"], record["peaked"], *sweep)


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
