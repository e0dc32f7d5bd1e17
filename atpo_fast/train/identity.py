"""What a run folder is a run of: settings and contents, compared before anything in it is continued.

Beside what can be continued lies a record of what it was made from: `run.json` for the checkpoints of RL,
`cold_start.run.json` for the cold start, `NAME.run.json` for a file of search trees. Files are compared by what was
read from them (questions, passages, weights, vocabulary), so that a moved folder is no difference and a changed one is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpo_fast.common.errors import InputError
from atpo_fast.common.files import replacing
from atpo_fast.common.jsonl import plain
from atpo_fast.config import Config, as_dict
from atpo_fast.train.digests import model_digest, questions_digest, text_digest
from atpo_fast.train.run import Run

_LOG = logging.getLogger(__name__)

HARMLESS = (
    # where and how it is computed
    "run_dir", "device", "ranks", "deepspeed", "engine.*", "model.gradient_checkpointing", "model.liger",
    "model.lora.in_engine",
    "train.row_tokens", "train.prefix_memory_gb", "rollout.schedule",
    # how long, and what is written
    "logging.*", "eval.*", "train.steps", "train.token_budget", "train.eval_every", "train.save_every",
    "train.keep_checkpoints", "train.keep_best", "train.async_save", "train.save_trees", "train.resume",
    "train.on_change", "train.max_mismatch_kl", "train.dynamic_sampling.max_refills",
    "train.dynamic_sampling.on_exhausted", "cold_start.save_every", "cold_start.validate_every",
    # how tools are reached
    "tools.backoff_seconds", "tools.cache", "tools.cache_mb", "tools.calls_per_tool", "tools.concurrency",
    "tools.index_dir", "tools.python_processes", "tools.retries", "tools.search_url", "tools.timeouts",
    "tools.timeout_seconds",
    # compared by their contents
    "model.path", "model.package", "model.reference_path", "data.root", "data.train_files", "data.eval_files",
    "data.corpus_files", "data.columns.*", "data.max_train_questions", "data.max_eval_questions",
    "evaluation questions",
)  # fmt: skip
"""Settings and contents with which a run may go on; a name that ends in `*` stands for all that begin so."""


@dataclass(frozen=True, slots=True)
class Scope:
    """A thing that can be continued, and what it does not depend on."""

    name: str
    indifferent: tuple[str, ...]


RUN = Scope("the run", ("cold_start.*", "demonstrations"))
COLD_START = Scope(
    "the cold start",
    ("method", "optim.lr", "optim.betas", "optim.warmup_steps", "train.*", "credit.*", "objective.*", "rollout.*",
     "reward.*", "training questions", "reference"),
)  # fmt: skip
TREES = Scope(
    "the file of search trees",
    ("method", "optim.*", "train.*", "credit.*", "objective.*", "cold_start.*", "demonstrations", "reference"),
)


class ChangedRunError(InputError):
    """A run folder holds a run of something else; the message names each difference."""

    on_every_rank = True


def claim(run: Run, path: Path, scope: Scope, *, continued: bool, model: Path | None = None) -> None:
    """Record in `path` what this run is of; where something is `continued`, compare with the record that is there.

    Differences that are harmless are named, others too. A collective. `model` is the folder of the weights in use,
    where they are not those of `model.path`.

    Raises ChangedRunError for a difference that is not harmless, unless `train.on_change` is `continue`.
    """
    record = describe(run, model)
    before = _read(path) if continued else None
    run.barrier()  # nobody writes before all have read
    changes = list(before.get("changes", [])) if before else []
    if before is not None:
        found = list(differences(before, record, scope))
        grave = [text for name, text in found if not _matches(name, HARMLESS)]
        harmless = [text for name, text in found if _matches(name, HARMLESS)]
        if grave and run.config.train.on_change == "refuse":
            raise ChangedRunError(_refusal(path.parent, scope, grave, harmless))
        if run.is_main and harmless:
            run.progress.message(f"{scope.name} goes on with other settings, which is harmless: {'; '.join(harmless)}")
        if run.is_main and grave:
            _LOG.warning("%s GOES ON AS SOMETHING ELSE (train.on_change): %s", scope.name.upper(), "; ".join(grave))
        changes += [grave + harmless] if found else []
    elif continued and run.is_main:
        _LOG.warning("%s is missing or damaged: nobody can tell whether %s is of these settings", path, scope.name)
    if run.is_main:
        with replacing(path) as partial:
            partial.write_text(json.dumps(record | {"changes": changes}, indent=1))


def describe(run: Run, model: Path | None = None) -> dict[str, dict[str, Any]]:
    """Describe what a run is of: its settings by dotted name, and digests of its contents."""
    config, task = run.config, run.task
    vocabulary = json.dumps(task.tokenizer.get_vocab(), sort_keys=True)
    weights = model or (None if config.model.path is None else Path(config.model.path))
    reference = config.model.reference_path
    contents = {
        "model": None if weights is None else model_digest(weights),
        "reference": None if reference is None else model_digest(Path(reference)),
        "tokenizer": text_digest([vocabulary, str(task.tokenizer.chat_template)]),
        "training questions": questions_digest(task.train),
        "evaluation questions": questions_digest(task.eval),
        "passages": f"{len(task.passages)}, {text_digest(passage.contents for passage in task.passages)}",
        "demonstrations": f"{len(task.demonstrations)}, {text_digest(_demonstrations(run))}",
        **{f"code of {name}": text_digest([path.read_text()]) for name, path in _own_code(config)},
    }
    return {"settings": dict(_flat(plain(as_dict(config)))), "contents": contents}


def differences(
    before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]], scope: Scope
) -> Iterator[tuple[str, str]]:
    """Yield (name, words) of each setting and content that differs and that the scope depends on.

    What only one of the two has is left out: it is of another version, or of another kind of engine.
    """
    for part, words in (("settings", "{}: {!r} before, {!r} now"), ("contents", "{}: others ({} before, {} now)")):
        old, new = before.get(part, {}), now[part]
        for name in new:
            if name in old and old[name] != new[name] and not _matches(name, scope.indifferent):
                yield name, words.format(name, old[name], new[name])


def _refusal(folder: Path, scope: Scope, grave: list[str], harmless: list[str]) -> str:
    lines = [f"{folder}: {scope.name} in it is of something else:", *(f"  {text}" for text in grave)]
    lines += [f"  (harmless) {text}" for text in harmless]
    advice = "put these back, choose another run_dir, begin again with train.resume=never, or go on all the same with "
    return "\n".join([*lines, f"{advice}train.on_change=continue"])


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"settings", "contents"} <= record.keys() else None


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(name.startswith(p[:-1]) if p.endswith("*") else name == p for p in patterns)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _demonstrations(run: Run) -> Iterator[str]:
    for tree in run.task.demonstrations:
        yield from (str(turn.action_ids.tolist() + turn.observation_ids.tolist()) for turn in tree.turns)


def _own_code(config: Config) -> Iterator[tuple[str, Path]]:
    """Yield the user's own Python files that task and tools name, as `file.py` or `file.py:function`."""
    for text in _texts([plain(as_dict(config.task)), plain(as_dict(config.tools))]):
        name = text.partition(":")[0]
        if name.endswith(".py") and Path(name).is_file():
            yield name, Path(name)


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts inside of plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
