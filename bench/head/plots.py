"""Plots of the head operators: time and memory of every implementation, and the sweeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from bench.core.plots import Entries, dots, measured, name_lines
from bench.core.verdicts import Record, p50

COLOURS = {
    "ours": "#d62728",
    "plain": "#555555",
    "compiled": "#1f77b4",
    "trl": "#2ca02c",
    "liger_scaled_ce": "#ff7f0e",
    "liger_flce": "#bcbd22",
    "liger_grpo": "#8c564b",
    "cce": "#9467bd",
    "verl": "#17becf",
    "quack": "#e377c2",
    "published_loop": "#7f7f7f",
}
SWEEPS = {
    "clipped": "share of the turns that are clipped",
    "loss_tokens": "share of the tokens with loss",
    "turn_length": "tokens a turn",
}
UNSWEPT = {"clipped": 0, "loss_tokens": 1, "turn_length": 64}


def _unswept(record: Record) -> bool:
    return all(record[key] == value for key, value in UNSWEPT.items())


def _label(record: Record) -> str:
    mode = {"forward": "no grad", "gradient": "fwd+bwd", "entropy_gradient": "fwd+bwd, entropy"}[record["mode"]]
    logits = "" if record["bench"] == "turn_policy_loss" else (" peaked" if record["peaked"] else " random")
    return f"{record['bench']} {mode}\n{'×'.join(map(str, record['shape']))} {record['dtype']}{logits}"


def times(records: list[Record]) -> Any:
    """Draw time and peak memory relative to ours, a case a line; None where there is nothing to compare."""
    chosen = [r for r in records if _unswept(r) and "ours" in measured(r) and len(measured(r)) > 1]
    if not chosen:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 1 + 0.42 * len(chosen)), sharey=True)
    panels: list[tuple[Any, Callable[[dict[str, Any]], float], str]] = [
        (left, p50, "time / ours"),
        (right, lambda entry: max(entry["peak_bytes"], 1), "peak memory beyond inputs / ours"),
    ]
    for axes, value, text in panels:
        dots(axes, [_over_ours(measured(record), value) for record in chosen], COLOURS)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(text)
        axes.grid(alpha=0.3)
    name_lines(left, map(_label, chosen))
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _over_ours(entries: Entries, value: Callable[[dict[str, Any]], float]) -> dict[str, float]:
    return {name: value(entry) / value(entries["ours"]) for name, entry in entries.items()}


def sweeps(records: list[Record]) -> Any:
    """Draw the largest shape of linear_turn_policy_loss of which something else than the shape was changed."""
    turn = [r for r in records if r["bench"] == "linear_turn_policy_loss"]
    swept = [r for r in turn if not _unswept(r)]
    if not swept:
        return None
    base = max(swept, key=lambda r: (len([x for x in swept if x["shape"] == r["shape"]]), r["shape"]))
    same = [r for r in turn if all(r[key] == base[key] for key in ("shape", "dtype", "peaked"))]
    figure, panels = plt.subplots(1, len(SWEEPS), figsize=(10, 2.8), sharey=True)
    for axes, (key, text) in zip(panels, SWEEPS.items(), strict=True):
        line = sorted((r for r in same if all(r[k] == v for k, v in UNSWEPT.items() if k != key)), key=lambda r: r[key])
        for name, colour in COLOURS.items():
            points = [(r[key], p50(measured(r)[name])) for r in line if name in measured(r)]
            if len(points) > 1:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name, markersize=4)
        axes.set_xlabel(text)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)  # after all lines: the panels share it
    panels[2].set_xscale("log", base=2)
    panels[2].xaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("ms, forward + backward")
    panels[0].legend(fontsize=7)
    figure.suptitle(f"linear_turn_policy_loss {'×'.join(map(str, base['shape']))} {base['dtype']}", fontsize=9)
    return figure
