"""Shared parts of the plots of RESULTS.md: a dot for each implementation, a case a line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from bench.core.verdicts import Record

STYLE: Any = {"svg.hashsalt": "atpo", "svg.fonttype": "none", "font.size": 9}
Entries = dict[str, dict[str, Any]]


def measured(record: Record) -> Entries:
    """Return the implementations of a record that were timed."""
    return {name: entry for name, entry in record["implementations"].items() if "ms" in entry}


def dots(axes: Any, lines: list[Mapping[str, float]], colours: Mapping[str, str]) -> None:
    """Draw a dot for each implementation's value, one line of `lines` below the other."""
    for name, colour in colours.items():
        points = [(values[name], y) for y, values in enumerate(lines) if name in values]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=colour, label=name, markersize=5)


def name_lines(axes: Any, labels: Iterable[str]) -> None:
    """Write the cases beside the lines, the first on top."""
    labels = list(labels)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()


def draw(figures: Mapping[str, Callable[[], Any]], folder: Path, prefix: str) -> list[Path]:
    """Make and save the figures that there is something for; return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, make in figures.items():
            figure = make()
            if figure is not None:
                paths.append(folder / f"{prefix}-{name}.svg")
                figure.savefig(paths[-1], metadata={"Date": None}, bbox_inches="tight")
                plt.close(figure)
    return paths
