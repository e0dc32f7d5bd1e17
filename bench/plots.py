"""Plots of RESULTS.md: every implementation's time and memory, and the sweeps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import head_report
import matplotlib
import tree_report

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter
from tree_plots import draw_times
from verdicts import Record

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


def draw(device: str, records: list[Record], folder: Path) -> list[Path]:
    """The plots of one device; their files."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = "cpu" if device.startswith("CPU") else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    with matplotlib.rc_context({"svg.hashsalt": "atpo", "svg.fonttype": "none", "font.size": 9}):
        head, trees = ([r for r in records if r["bench"] in kind.BENCHES] for kind in (head_report, tree_report))
        figures = {"trees": draw_times(trees), "times": _times(head), "sweeps": _sweeps(head)}
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"{slug}-{name}.svg")
            with matplotlib.rc_context({"svg.hashsalt": "atpo", "svg.fonttype": "none"}):
                figure.savefig(paths[-1], metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)
    return paths


def _measured(record: Record) -> dict[str, dict[str, Any]]:
    return {name: entry for name, entry in record["implementations"].items() if "ms" in entry}


def _unswept(record: Record) -> bool:
    return all(record[key] == value for key, value in UNSWEPT.items())


def _label(record: Record) -> str:
    mode = {"forward": "no grad", "gradient": "fwd+bwd", "entropy_gradient": "fwd+bwd, entropy"}[record["mode"]]
    logits = "" if record["bench"] == "turn_policy_loss" else (" peaked" if record["peaked"] else " random")
    return f"{record['bench']} {mode}\n{'×'.join(map(str, record['shape']))} {record['dtype']}{logits}"


def _times(records: list[Record]) -> Any:
    """Time and peak memory relative to ours, a case a line."""
    chosen = [r for r in records if _unswept(r) and "ours" in _measured(r) and len(_measured(r)) > 1]
    if not chosen:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 1 + 0.42 * len(chosen)), sharey=True)
    for name, colour in COLOURS.items():
        rows = [(y, _measured(r)) for y, r in enumerate(chosen) if name in _measured(r)]
        for axes, value in ((left, lambda e: e["ms"]["p50"]), (right, lambda e: max(e["peak_bytes"], 1))):
            points = [(value(m[name]) / value(m["ours"]), y) for y, m in rows]
            if points:
                axes.plot(*zip(*points, strict=True), "o", color=colour, label=name, markersize=5)
    for axes, text in ((left, "time / ours"), (right, "peak memory beyond inputs / ours")):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(text)
        axes.grid(alpha=0.3)
    left.set_yticks(range(len(chosen)), [_label(r) for r in chosen], fontsize=7)
    left.invert_yaxis()
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _sweeps(records: list[Record]) -> Any:
    """The largest shape of linear_turn_policy_loss of which something else than the shape was changed."""
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
            points = [(r[key], _measured(r)[name]["ms"]["p50"]) for r in line if name in _measured(r)]
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
