"""EM over a budget: values between evaluations, areas, and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np

Axis = Literal["generated", "trained"]
Record = Mapping[str, Any]
_T_95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantile of Student's t, by degrees of freedom."""


def value_at(record: Record, axis: Axis, budget: float, hops: str | None = None) -> float:
    """Return EM when a run has spent a budget, on the line between the evaluations around it."""
    spent = [point[axis] for point in record["points"]]
    values = [point["em"] if hops is None else point["by_hops"][hops] for point in record["points"]]
    return float(np.interp(budget, spent, values))


def area(record: Record, axis: Axis, budget: float) -> float:
    """Return the mean of EM over a budget: the area under its curve, divided by the budget."""
    inner = [point[axis] for point in record["points"] if point[axis] < budget]
    spent = [*inner, budget]
    return float(np.trapezoid([value_at(record, axis, x) for x in spent], spent)) / budget


def common_budget(records: Sequence[Record], axis: Axis) -> float:
    """Return what every run has spent at its end."""
    return float(min(record["points"][-1][axis] for record in records))


def interval(values: Sequence[float]) -> str:
    """Write the mean of some seeds and the half width of its 95 % interval (Student's t); one seed has none."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    half = _T_95[len(values) - 1] * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):.3f} ± {half:.3f}"
