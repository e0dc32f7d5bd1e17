"""The plot of a soak: EM and what the ranks hold, by step, undisturbed and under faults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bench.soak.watch import QUANTITIES

_COLOURS = {"quiet": "#1f77b4", "faulty": "#d62728"}
_SMOOTHED = 20  # steps of a running mean


def figure(runs: Mapping[str, Mapping[str, Any]]) -> Any:
    """Draw EM of the training questions, and memory, threads and handles of the ranks; faults are vertical lines."""
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(1, 1 + len(QUANTITIES), figsize=(14, 3.2))
    for name, run in runs.items():
        em = np.convolve(run["em"], np.ones(_SMOOTHED) / _SMOOTHED, mode="valid")
        axes[0].plot(run["recorded_steps"][_SMOOTHED - 1 :], em, color=_COLOURS[name], label=name, linewidth=1.5)
        for panel, quantity in zip(axes[1:], QUANTITIES, strict=True):
            for rank in ("rank 0", "rank 1"):
                points = [(s["step"], s[quantity]) for s in run["samples"] if s["process"] == rank]
                panel.plot(*zip(*points, strict=True), ".", color=_COLOURS[name], markersize=3)
    for fault in runs["faulty"]["faults"]:
        axes[0].axvline(fault["step"], color="grey", linewidth=0.6, alpha=0.6)
    axes[0].set_title(f"EM of the training questions, mean of {_SMOOTHED} steps; grey: faults", fontsize=8)
    axes[0].legend(fontsize=7)
    for panel, title in zip(axes[1:], QUANTITIES.values(), strict=True):
        panel.set_title(f"{title}, both ranks", fontsize=8)
        panel.set_ylim(bottom=0)
    for panel in axes:
        panel.set_xlabel("step", fontsize=8)
        panel.grid(alpha=0.3)
    return drawn
