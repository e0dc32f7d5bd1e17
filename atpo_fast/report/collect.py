"""What the report shows, read from a run folder or a forest."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from atpo_fast.report.charts import Chart, charts
from atpo_fast.telemetry.run_logger import METRICS_FILE, TREES_FILE, read_metrics
from atpo_fast.tree.storage import read_forest_texts, read_trees

TREES_SHOWN = 6
FORESTS = ("rollouts.jsonl", "rollouts.parquet")  # of `atpo-fast rollout`, in the run folder


def collect_run(folder: Path) -> dict[str, Any]:
    """Gather everything that the page shows: name, facts, charts, trees, configuration, and what is missing.

    Raises:
        ValueError: metrics.jsonl or trees.jsonl has a malformed line that is not its last.
    """
    missing: list[str] = []
    records = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else []
    if not records:
        missing.append("metrics.jsonl has no records yet")
    missing += _missing_phases(records)
    summary = _read_summary(folder / "summary.json", missing)
    config_text, config = _read_config(folder / "config.yaml", missing)
    drawn: list[Chart] = charts(records)
    return {
        "name": folder.resolve().name,
        "folder": str(folder.resolve()),
        "written": _now(),
        "headline": _headline(summary, records),
        "facts": _setup_facts(config) + _outcome_facts(summary, records),
        "charts": drawn,
        "trees": _read_trees(folder, missing),
        "config": config_text,
        "summary": summary,
        "missing": missing,
    }


def collect_forest(path: Path) -> dict[str, Any]:
    """Gather the same for the first trees of a file of `atpo-fast rollout`.

    Raises:
        ValueError: a record is not a stored tree.
    """
    trees = read_forest_texts(path, TREES_SHOWN)
    return {
        "name": path.resolve().name,
        "folder": str(path.resolve()),
        "written": _now(),
        "headline": _headline({}, []),
        "facts": [("Search trees shown", f"the first {len(trees)} of the file")],
        "charts": [],
        "trees": trees,
        "config": "",
        "summary": {},
        "missing": ["metrics and configuration: this is a file of search trees"],
    }


def has_records(folder: Path) -> bool:
    """Tell whether a folder holds anything to report on."""
    return any((folder / name).exists() for name in (METRICS_FILE, *FORESTS))


def _now() -> str:
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")


def _missing_phases(records: list[dict[str, Any]]) -> list[str]:
    present = {record.get("phase") for record in records}
    names = {"cold_start": "cold start", "train": "training", "eval": "evaluation"}
    return [f"no {text} records in metrics.jsonl" for phase, text in names.items() if records and phase not in present]


def _read_summary(path: Path, missing: list[str]) -> dict[str, Any]:
    if not path.is_file():
        missing.append("summary.json is not there: the run has not finished")
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        missing.append(f"summary.json cannot be read ({error})")
        return {}
    return summary if isinstance(summary, dict) else {}


def _read_config(path: Path, missing: list[str]) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        missing.append("config.yaml is not there")
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        missing.append(f"config.yaml cannot be read ({error})")
        return text, {}
    return text, config if isinstance(config, dict) else {}


def _read_trees(folder: Path, missing: list[str]) -> list[dict[str, Any]]:
    """Read the trees of the first and of the last step, at most `TREES_SHOWN`; without any, those of a forest."""
    records = read_trees(folder / TREES_FILE) if (folder / TREES_FILE).is_file() else []
    trees = [tree for tree in records if isinstance(tree.get("step"), int) and tree.get("turns")]
    if not trees:
        for forest in (folder / name for name in FORESTS):
            if forest.exists():
                return read_forest_texts(forest, TREES_SHOWN)
        missing.append("trees.jsonl is not there or empty: no search trees to draw (train.save_trees)")
        return []
    first, last = min(tree["step"] for tree in trees), max(tree["step"] for tree in trees)
    early = [tree for tree in trees if tree["step"] == first]
    late = [tree for tree in trees if tree["step"] == last] if last != first else []
    half = TREES_SHOWN // 2 if late else TREES_SHOWN
    return early[:half] + late[:half]


def _headline(summary: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return exact match before and after RL: from the summary, else from the evaluations so far."""
    evaluated = [r for r in records if r.get("phase") == "eval" and isinstance(r.get("eval/em"), int | float)]
    seen = [record["eval/em"] for record in evaluated]
    return {
        "cold_start_em": summary.get("cold_start_em", seen[0] if seen else None),
        "final_em": summary.get("final_em", seen[-1] if len(seen) > 1 else None),
        "finished": bool(summary),
        "questions": evaluated[-1].get("eval/questions") if evaluated else None,
    }


def _setup_facts(config: dict[str, Any]) -> list[tuple[str, str]]:
    if not config:
        return []
    get = _Lookup(config)
    size = f"random, {get('model', 'layers')} layers × {get('model', 'hidden_size')}"
    worlds = {"world": "embedded world of questions", "rooms": "embedded world of rooms"}
    questions = worlds.get(get("data", "source"), ", ".join(get("data", "train_files") or []))
    per_step, per_update = get("train", "questions_per_step"), get("train", "questions_per_minibatch")
    facts = [
        ("Model", get("model", "path") or size),
        ("Questions", questions),
        ("Tree search", _search_text(get)),
        ("Objective", f"{get('objective', 'preset')}, credit {get('credit', 'method')}"),
        ("Learning rate", get("optim", "lr")),
        ("Batch", f"{per_step} questions, mini-batches of {per_update}"),
        ("Steps", get("train", "steps")),
        ("Seed", get("seed")),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _search_text(get: _Lookup) -> str:
    strategy, chains = get("rollout", "strategy"), get("rollout", "initial_chains")
    if strategy == "chain":
        return f"{chains} independent chains"
    if strategy in ("arpo", "aepo"):
        return f"{strategy}, up to {get('rollout', 'samples_per_tree')} chains"
    trees = get("rollout", "trees_per_question")
    if strategy == "tree_grpo":
        strategy = f"{strategy}, {trees} trees"
    rounds, expansions = get("rollout", "expansion_rounds"), get("rollout", "expansions_per_round")
    return f"{strategy}, {chains} chains + {rounds} rounds × {expansions}"


def _outcome_facts(summary: dict[str, Any], records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    seconds = summary.get("train_seconds", _elapsed(records))
    if isinstance(seconds, int | float):
        facts.append(("Wall time", _duration(float(seconds))))
    if isinstance(summary.get("overlap"), int | float):
        facts.append(("Tree overlap", f"{summary['overlap']:.1%} of flat tokens saved"))
    unique, prefilled = summary.get("unique_tokens"), summary.get("prefilled_tokens")
    if isinstance(unique, int) and isinstance(prefilled, int):
        shared = summary.get("shared_tokens") or 0
        among = f", {shared:,} shared among questions" if shared else ""
        facts.append(("Tokens", f"{unique:,} unique, {prefilled:,} prefilled{among}"))
    return facts


def _elapsed(records: list[dict[str, Any]]) -> float | None:
    """Return the seconds between the first and the last record, interruptions included; None for fewer than two."""
    times = [r["time"] for r in records if isinstance(r.get("time"), int | float) and math.isfinite(r["time"])]
    return max(times) - min(times) if len(times) > 1 else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


class _Lookup:
    """Settings by path; None where the configuration does not say."""

    def __init__(self, config: dict[str, Any]):
        self._config = config

    def __call__(self, *keys: str) -> Any:
        value: Any = self._config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value
