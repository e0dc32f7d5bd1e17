"""The comparison's table and figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.core.plots import draw
from bench.methods.curves import Axis, Record, area, common_budget, interval, value_at
from bench.methods.plan import CONTENDERS

HEADINGS = (
    "method",
    "lr",
    "EM, half",
    "EM",
    "1 hop",
    "2 hops",
    "3 hops",
    "3 hops, less at2po",
    "area",
    "EM at equal trained tokens",
    "generated",
    "trained",
    "CPU seconds",
)
_NAMES = {"generated": "generated tokens", "trained": "unique tokens of updates"}


def table(records: Sequence[Record], budget: float) -> str:
    """Write a line for each contender, in Markdown: EM at half and full budget, by hops, area, and what was spent."""
    trained = common_budget(records, "trained")
    by_seed = {record["seed"]: record for record in records if record["contender"] == "at2po"}
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}", _cold_start(records)]
    for name, runs in _by_contender(records):

        def seeds(measure: Callable[[Record], float], runs: list[Record] = runs) -> str:
            return interval([measure(run) for run in runs])

        cells = [
            name,
            f"{runs[0]['rate']:g}",
            seeds(lambda run: value_at(run, "generated", budget / 2)),
            seeds(lambda run: value_at(run, "generated", budget)),
            *(seeds(lambda run, hops=hops: value_at(run, "generated", budget, hops)) for hops in "123"),  # type: ignore[misc]
            _paired(runs, by_seed, budget),
            seeds(lambda run: area(run, "generated", budget)),
            seeds(lambda run: value_at(run, "trained", trained)),
            *(f"{np.mean([run['points'][-1][axis] for run in runs]):,.0f}" for axis in ("generated", "trained")),
            f"{np.mean([run['cpu_seconds'] for run in runs]):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cold_start(records: Sequence[Record]) -> str:
    """Write the line of the model that all start from."""
    start = records[0]["points"][0]
    em, hops = f"{start['em']:.3f}", [f"{start['by_hops'][hops]:.3f}" for hops in "123"]
    return f"| react (the cold start) | - | {em} | {em} | {' | '.join(hops)} | - | {em} | {em} | 0 | 0 | 0 |"


def _paired(runs: Sequence[Record], by_seed: Mapping[int, Record], budget: float) -> str:
    """Write by how much runs exceed those of at2po with the same seed, which share the order of the questions."""
    pairs = [(run, by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]
    if not pairs or runs[0]["contender"] == "at2po":
        return "-"
    return interval([value_at(a, "generated", budget, "3") - value_at(b, "generated", budget, "3") for a, b in pairs])


def _by_contender(records: Sequence[Record]) -> Iterable[tuple[str, list[Record]]]:
    for name in CONTENDERS:
        runs = [record for record in records if record["contender"] == name]
        if runs:
            yield name, runs


def figures(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw EM over generated and over trained tokens, means over seeds; returns the files."""
    return draw({"curves": lambda: _curves(records)}, folder, "methods")


def _curves(records: Sequence[Record]) -> Any:
    from matplotlib import pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    axes_of: tuple[Axis, Axis] = ("generated", "trained")
    for axes, axis in zip(both, axes_of, strict=True):
        grid = np.linspace(0, common_budget(records, axis), 40)
        for name, runs in _by_contender(records):
            means = [np.mean([value_at(run, axis, x) for run in runs]) for x in grid]
            variant = name.startswith("at2po,")
            width = 2.5 if name == "at2po" else 1.2
            axes.plot(grid / 1000, means, label=name, linewidth=width, linestyle="--" if variant else "-")
        axes.set_xlabel(f"{_NAMES[axis]}, thousands")
        axes.grid(alpha=0.3)
    both[0].set_ylabel("EM, greedy")
    both[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
