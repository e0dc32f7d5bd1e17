"""Which metrics are drawn together, and their points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypedDict

Point = tuple[int, float | None]
Record = dict[str, Any]


class Series(TypedDict):
    """A named line of a chart and its points."""

    name: str
    points: list[Point]


class Chart(TypedDict):
    """One plot; `kind` is `line`, `log` (log scale where every value allows it) or `stack` (bars on one another)."""

    title: str
    x: str
    y: str
    kind: str
    more: bool  # whether the chart is among the further metrics
    series: list[Series]


# title, phase, y label with unit, kind, {metric: line name}
_CHARTS: tuple[tuple[str, str, str, str, dict[str, str]], ...] = (
    ("Reward of sampled trajectories", "train", "mean over leaves", "line", {
        "reward/mean": "reward", "reward/em": "exact match", "reward/f1": "F1", "reward/format": "format"}),
    ("Evaluation, greedy", "eval", "mean over evaluation questions", "line", {
        "eval/em": "exact match", "eval/f1": "F1", "eval/reward": "reward", "eval/format": "format"}),
    ("Why rewards are what they are", "train", "share of trajectories", "stack", {
        "outcome/right": "right", "outcome/wrong": "wrong", "outcome/unread": "answer cannot be read",
        "outcome/no_answer": "no answer", "outcome/no_thought": "no thought", "outcome/open_thought": "open thought",
        "outcome/answer_tags": "answer tags", "outcome/open_call": "call without end or result",
        "outcome/no_box": "no box", "outcome/token_limit": "limit of tokens", "outcome/call_limit": "limit of calls"}),
    ("Questions without signal", "train", "share of questions", "line", {
        "sampling/no_signal": "all trajectories earn the same"}),
    ("Policy entropy", "train", "nats per token", "line", {
        "policy/entropy": "trainer, all tokens", "rollout/entropy": "rollout, mean of turns"}),
    ("Clipped ratios", "train", "share of action tokens", "line", {
        "policy/clipped_low": "below the range", "policy/clipped_high": "above the range"}),
    ("KL divergence", "train", "nats per token", "log", {
        "policy/approx_kl": "old policy, approximate", "rollout/mismatch_kl": "rollout to trainer",
        "rollout/logprob_gap": "rollout to trainer, mean difference of log-probs",
        "policy/ref_kl": "reference"}),
    ("Gradient norm", "train", "norm before clipping", "line", {"policy/grad_norm": "gradient norm"}),
    ("Throughput", "train", "tokens per second", "line", {
        "rate/rollout_tokens_per_s": "rollout", "rate/train_tokens_per_s": "training"}),
    ("Overlap of trajectories", "train", "1 − unique / flat tokens", "line", {"tokens/overlap": "overlap"}),
    ("Tokens per step", "train", "tokens", "line", {
        "tokens/flat": "flat", "tokens/unique": "unique", "tokens/decoded": "sampled", "tokens/pruned": "pruned"}),
    (
        "Cold start loss",
        "cold_start",
        "nats per action token",
        "line",
        {"cold_start/loss": "loss", "cold_start/validation_loss": "validation"},
    ),
)  # fmt: skip
_X_LABELS = {"train": "RL step", "eval": "RL step", "cold_start": "optimizer step"}
_NOT_DRAWN = {"phase", "step", "time", "time/total"}


def charts(records: Sequence[Record]) -> list[Chart]:
    """Draw all metrics that have a point: the chosen charts, the phase times, then the further metrics one by one."""
    by_phase: dict[str, list[Record]] = {}
    for record in _newest_per_step(records):
        by_phase.setdefault(record["phase"], []).append(record)
    drawn = [
        _chart(title, phase, y, kind, metrics, by_phase.get(phase, [])) for title, phase, y, kind, metrics in _CHARTS
    ]
    drawn.insert(-1, _phase_times(by_phase.get("train", [])))
    known = {name for *_, metrics in _CHARTS for name in metrics} | _NOT_DRAWN
    for phase, group in by_phase.items():
        names = sorted({name for record in group for name in record} - known)
        names = [name for name in names if not name.startswith("time/")]
        drawn += [_chart(name, phase, "", "line", {name: name}, group) | {"more": True} for name in names]  # type: ignore[misc]
    return [chart for chart in drawn if chart["series"]]


def _newest_per_step(records: Sequence[Record]) -> list[Record]:
    """Keep one record per phase and step, the last one written, in the order of steps."""
    newest: dict[tuple[str, int], Record] = {}
    for record in records:
        if isinstance(record.get("phase"), str) and isinstance(record.get("step"), int):
            newest[record["phase"], record["step"]] = record
    return [newest[key] for key in sorted(newest)]


def _chart(title: str, phase: str, y: str, kind: str, metrics: dict[str, str], records: Sequence[Record]) -> Chart:
    lines = [Series(name=label, points=_points(records, metric)) for metric, label in metrics.items()]
    series = [line for line in lines if any(value is not None for _, value in line["points"])]
    return Chart(title=title, x=_X_LABELS.get(phase, "step"), y=y, kind=kind, more=False, series=series)


def _points(records: Sequence[Record], metric: str) -> list[Point]:
    """Return (step, value) where the metric was recorded; a value that is not finite leaves a gap."""
    return [(record["step"], _finite(record[metric])) for record in records if _is_number(record.get(metric))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _phase_times(records: Sequence[Record]) -> Chart:
    """Stack the seconds per step by phase; one with parts (`a/b`) as its parts and the rest, evaluation whole."""
    recorded = dict.fromkeys(name for record in records for name in record if name.startswith("time/"))
    names = [name for name in recorded if name != "time/total" and not name.startswith("time/eval/")]
    series: list[Series] = []
    for name in names:
        parts = [other for other in names if other.startswith(name + "/") and "/" not in other[len(name) + 1 :]]
        label = name.removeprefix("time/") + (", rest" if parts else "")
        points = [(record["step"], _own_seconds(record, name, parts)) for record in records]
        series.append(Series(name=label, points=points))
    return Chart(title="Time per step", x="RL step", y="seconds", kind="stack", more=False, series=series)


def _own_seconds(record: Record, name: str, parts: Sequence[str]) -> float | None:
    """Return the seconds of a phase without those of its parts."""
    inner = sum(record[part] for part in parts if _is_number(record.get(part)))
    return _finite(max(0.0, record[name] - inner)) if _is_number(record.get(name)) else 0.0
