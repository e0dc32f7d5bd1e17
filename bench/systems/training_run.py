"""The record of a training with a real model: its curves, and its evaluations before, between and after.

    python -m bench training-run RUN_FOLDER [--compare FOLDER ...] --evals react cold_start after_rl

RUN_FOLDER is what `atpo-fast train` has written; `--evals` names the results of `atpo-fast eval --name NAME` in its
folder eval/, in the order of the table. Writes bench/results/cpu/NAME.json (NAME is the run folder's), its curve beside
the other plots, and prints the table in Markdown. Nothing is trained here, and no data goes into the record.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atpo_fast.telemetry.run_logger import read_metrics
from bench.core.plots import draw
from bench.core.records import RESULTS, device_name, write_record

Record = Mapping[str, Any]
_STEP_KEYS = (
    "reward/mean",
    "reward/em",
    "reward/format",
    "rollout/tool_calls",
    "rollout/entropy",
    "policy/grad_norm",
    "rollout/mismatch_kl",
    "tokens/unique",
    "tokens/flat",
    "tokens/prefilled",
    "tokens/decoded",
    "tokens/trained",
    "time/total",
)
_EVAL_KEYS = ("questions", "em", "f1", "format", "turns", "tool_calls", "tokens")


def main(arguments: list[str] | None = None) -> None:
    """Write the record and the curve of a run, and print its table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench training-run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--compare", type=Path, nargs="*", default=[], metavar="FOLDER", help="other runs in the curve")
    parser.add_argument("--evals", nargs="*", default=[], metavar="NAME", help="names given to `atpo-fast eval --name`")
    options = parser.parse_args(arguments)
    runs = {folder.name: curves(folder) for folder in (options.folder, *options.compare)}
    evals = {name: evaluation(options.folder / "eval" / f"{name}.json") for name in options.evals}
    name = options.folder.name
    write_record(name, "training_run", "cpu", device=device_name("cpu"), runs=runs, evals=evals)
    draw({"curves": lambda: figure(runs)}, RESULTS / "plots", name)
    print(table(evals))


def curves(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Return the metrics of a run that its record keeps: of the cold start, of the steps and of the evaluations."""
    found: dict[str, list[dict[str, float]]] = {"cold_start": [], "train": [], "eval": []}
    for record in read_metrics(folder / "metrics.jsonl"):
        kept = {
            key: value
            for key, value in record.items()
            if key in _STEP_KEYS or key.startswith(("cold_start/", "eval/")) and isinstance(value, int | float)
        }
        found[record["phase"]].append({"step": record["step"], **kept})
    return found


def evaluation(path: Path) -> dict[str, Any]:
    """Return what the record keeps of an evaluation: each set's and each average's scores with their intervals."""
    whole = json.loads(path.read_text())
    sets = {name: {key: values[key] for key in _EVAL_KEYS} for name, values in whole["sets"].items()}
    return {"level": whole["level"], "sets": sets, "averages": whole["averages"]}


def table(evals: Mapping[str, Record]) -> str:
    """Write EM with its interval for each set, a line for each evaluation, then format and searches."""
    if not evals:
        return ""
    names = list(next(iter(evals.values()))["sets"])
    lines = [f"| | {' | '.join(names)} | all: EM | F1 | format | searches |", "|---" * (len(names) + 5) + "|"]
    for name, found in evals.items():
        sets = [found["sets"][key] for key in names]
        count = sum(values["questions"] for values in sets)
        means = {
            key: sum(values[key] * values["questions"] for values in sets) / count for key in ("format", "tool_calls")
        }
        overall = found["averages"]["all"]
        cells = [_interval(values["em"]) for values in sets]
        cells += [_interval(overall["em"]), _interval(overall["f1"])]
        lines.append(f"| {name} | {' | '.join(cells)} | {means['format']:.2f} | {means['tool_calls']:.2f} |")
    return "\n".join(lines)


def _interval(estimate: Record) -> str:
    """Write a share in per cent with the ends of its interval."""
    return f"{100 * estimate['mean']:.1f} ({100 * estimate['low']:.0f}-{100 * estimate['high']:.0f})"


def figure(runs: Mapping[str, Mapping[str, Sequence[Record]]]) -> Any:
    """Draw the loss of the cold start, and reward and EM of RL: the steps', their running means, the evaluations'."""
    from matplotlib import pyplot as plt

    drawn, (cold, reward, em) = plt.subplots(1, 3, figsize=(12, 3.4))
    for name, run in runs.items():
        _line(cold, run["cold_start"], "cold_start/loss", "training, " + name)
        _line(cold, run["cold_start"], "cold_start/validation_loss", "held out, " + name, marker="o")
        _line(reward, run["train"], "reward/mean", name, smooth=5)
        _line(em, run["train"], "reward/em", "training, " + name, smooth=5)
        _line(em, run["eval"], "eval/em", "held out, greedy, " + name, marker="o")
    for axes, title, x in (
        (cold, "loss of the cold start", "optimizer step"),
        (reward, "reward (mean of 5 steps)", "RL step"),
        (em, "EM", "RL step"),
    ):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(x)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return drawn


def _line(axes: Any, records: Sequence[Record], key: str, label: str, *, marker: str = "", smooth: int = 1) -> None:
    points = [(record["step"], record[key]) for record in records if key in record]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    means = [sum(values[max(0, i + 1 - smooth) : i + 1]) / min(smooth, i + 1) for i in range(len(values))]
    axes.plot(steps, means, label=label, marker=marker, markersize=4, linewidth=1.5)
