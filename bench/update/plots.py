"""Plot of attention, layers and updates: the time of every implementation over ours, beside the bounds."""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot as plt

from bench.core.plots import dots, measured, name_lines
from bench.core.verdicts import Record, p50

COLOURS = {
    "flat": "#1f77b4",
    "flat_varlen": "#17becf",
    "flat_xformers": "#2ca02c",
    "flat_full_head": "#ff7f0e",
    "flat_varlen_full_head": "#bcbd22",
    "flat_padded": "#555555",
    "tree_repeated": "#7f7f7f",
    "tree_sdpa": "#9467bd",
    "tree_flex_dense": "#8c564b",
    "none_clipped": "#e377c2",
    "flex": "#2ca02c",
    "flex_static": "#bcbd22",
    "flex_dense": "#8c564b",
    "sdpa": "#9467bd",
    "areal": "#17becf",
}
_MARKS = {"tokens": "|", "full_head": "x", "clipped": "|"}
_BOUNDS = {"tokens": "bound: T_flat / T_tree", "full_head": "bound: FLOPs, full head", "clipped": "bound: clipped"}


def draw_times(records: list[Record]) -> Any:
    """Draw a case a line, with the bounds of layers and updates in black; None where there is nothing to compare."""
    chosen = [record for record in records if "ours" in measured(record) and _others(record)]
    if not chosen:
        return None
    figure, axes = plt.subplots(figsize=(8, 1 + 0.36 * len(chosen)))
    dots(axes, [_others(record) for record in chosen], COLOURS)
    for bound, mark in _MARKS.items():
        points = [(r["bounds"][bound], y) for y, r in enumerate(chosen) if bound in _shown_bounds(r)]
        if points:
            axes.plot(*zip(*points, strict=True), mark, color="black", label=_BOUNDS[bound], markersize=10)
    axes.axvline(1, color="#d62728", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(ticks := [1, 1.5, 2, 3, 5, 8, 12], [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("time / ours")
    axes.grid(alpha=0.3)
    name_lines(axes, map(_label, chosen))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _others(record: Record) -> dict[str, float]:
    """Return the time over ours of the peers that do the same work."""
    timed = {name: entry for name, entry in measured(record).items() if entry["same_work"]}
    ours = p50(timed["ours"])
    return {name: p50(entry) / ours for name, entry in timed.items() if name != "ours"}


def _shown_bounds(record: Record) -> tuple[str, ...]:
    if "bounds" not in record:
        return ()
    if record["clipped"]:
        return ("clipped",)
    return ("tokens", "full_head") if record["bench"] == "policy_update" else ("tokens",)


def _label(record: Record) -> str:
    if record["bench"] == "tree_attention":
        return f"attention {record['mode']}\n{record['row_tokens']} × {'×'.join(map(str, record['heads']))}"
    forest = "published" if record["overlap"] is None else f"overlap {record['overlap']:g}"
    clipped = f", {record['clipped']:.0%} clipped" if record["clipped"] else ""
    kind = {"decoder_layer": "layer", "policy_update": "update"}[record["bench"]]
    return f"{kind} {record['model']}\n{forest}{clipped}, rows {record['max_tokens']}"
