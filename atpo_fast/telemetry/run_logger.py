"""Metrics of a run: metrics.jsonl always, TensorBoard and Weights & Biases when the configuration asks for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from atpo_fast.common.jsonl import Record, append_records, keep_records, plain, read_records
from atpo_fast.config import Config, as_dict

_LOG = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TREES_FILE = "trees.jsonl"
_NON_FINITE = {"nan", "inf", "-inf"}


class _Tracker(Protocol):
    """A program that shows metrics."""

    def write(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class RunLogger:
    """The metric records of a run; every method does nothing on ranks that are not `is_main`.

    A record is `{"phase": "cold_start" | "train" | "eval", "step": int, "time": Unix seconds, ...metrics}`. A failure
    to log (a full disk, a lost connection) is told on stderr when it begins, and does not raise. Records and trees that
    a full disk does not take wait, and are written with the next ones, or by `settle`.

    Args:
        run_dir: the run's folder, created if it does not exist.
        config: `config.logging` chooses the trackers.
        is_main: whether this process is the one that writes.

    Raises:
        ModuleNotFoundError: a tracker was asked for but is not installed.
        OSError: the run folder cannot be created.
    """

    def __init__(self, run_dir: Path | str, config: Config, *, is_main: bool = True):
        self.run_dir = Path(run_dir)
        self._files: dict[str, _JsonLines] = {}
        self._trackers: dict[str, _Tracker] = {}
        self._failed: set[str] = set()
        if not is_main:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._files = {name: _JsonLines(self.run_dir / name) for name in (METRICS_FILE, TREES_FILE)}
        if config.logging.tensorboard:
            self._trackers["TensorBoard"] = _TensorBoard(self.run_dir / "tensorboard")
        if config.logging.wandb_project:
            self._trackers["Weights & Biases"] = _WandB(config.logging.wandb_project, self.run_dir, as_dict(config))

    def log(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one record. Values: numbers, strings, one-element tensors (taken as float)."""
        values = {name: plain(value) for name, value in metrics.items()}
        if self._files:
            record = {"phase": phase, "step": int(step), "time": time.time(), **values}
            self._guarded(METRICS_FILE, partial(self._files[METRICS_FILE].append, [record]))
        for name, tracker in self._trackers.items():
            self._guarded(name, partial(tracker.write, phase, step, values))

    def log_trees(self, records: Sequence[Record]) -> None:
        """Append records of trees (`tree_record`) to trees.jsonl."""
        if self._files:
            self._guarded(TREES_FILE, partial(self._files[TREES_FILE].append, records))

    def settle(self) -> None:
        """Write what still waits. Raises OSError when there is still no room."""
        for file in self._files.values():
            file.settle()

    def truncate_after(self, step: int, phases: Sequence[str] = ("train", "eval")) -> None:
        """Remove what was written for later steps than `step`, the step of the checkpoint being resumed.

        Drops the records of `phases` from metrics.jsonl, and the later trees from trees.jsonl. A start from
        nothing is `truncate_after(-1, ("cold_start", "train", "eval"))`. TensorBoard hides overtaken points by itself.

        Raises:
            OSError: a file cannot be written; going on would log its steps twice.
        """
        if self._files:
            self._keep(METRICS_FILE, lambda record: record.get("phase") not in phases or record.get("step", 0) <= step)
            self._keep(TREES_FILE, lambda record: record.get("step", 0) <= step)

    def close(self) -> None:
        """Write what still waits and finish the trackers; the logger writes nothing afterwards."""
        for name, file in self._files.items():
            self._guarded(name, file.settle)
        for name, sink in self._trackers.items():
            self._guarded(name, sink.close)
        self._files, self._trackers = {}, {}

    def _keep(self, file: str, keep: Callable[[Record], bool]) -> None:
        path = self.run_dir / file
        if path.exists():
            keep_records(path, keep)

    def _guarded(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker raises, the run goes on
            if name not in self._failed:
                waits = "; what it lacks is written when there is room" if name in self._files else ""
                _LOG.warning("logging to %s of %s failed (%s); training goes on%s", name, self.run_dir, error, waits)
            self._failed.add(name)
        else:
            self._failed.discard(name)


class _JsonLines:
    """A file of JSON lines, to which records are appended at once; those that it cannot take wait for the next time."""

    def __init__(self, path: Path):
        self._path = path
        self._waiting: list[Record] = []

    def append(self, records: Sequence[Record]) -> None:
        """Append records after those that wait. Raises OSError; then they all wait."""
        self._waiting += records
        self.settle()

    def settle(self) -> None:
        """Append the records that wait. Raises OSError; then they wait on."""
        if self._waiting:
            append_records(self._path, self._waiting)
            self._waiting = []


class _TensorBoard:
    """Event files, one TensorBoard run per phase: their steps count separately."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("logging.tensorboard", "tensorboard") from error
        self._make_writer: Callable[..., Any] = SummaryWriter
        self._folder = folder
        self._writers: dict[str, Any] = {}

    def write(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        if phase not in self._writers:
            self._writers[phase] = self._make_writer(str(self._folder / phase), purge_step=step)
        for name, value in _numbers(metrics).items():
            self._writers[phase].add_scalar(name, value, step)
        self._writers[phase].flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _WandB:
    """A Weights & Biases run; every metric is plotted over the step of its own phase."""

    def __init__(self, project: str, run_dir: Path, config: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise _missing("logging.wandb_project", "wandb") from error
        self._run: Any = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), config=plain(config))
        self._known: set[str] = set()

    def write(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = _numbers(metrics)
        for name in numbers.keys() - self._known:
            self._run.define_metric(name, step_metric=f"{phase}/step")
            self._known.add(name)
        self._run.log({**numbers, f"{phase}/step": step})

    def close(self) -> None:
        self._run.finish()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl, non-finite numbers as floats again; a half-written last line is skipped.

    Raises:
        FileNotFoundError, ValueError: as `atpo_fast.common.jsonl.read_records`.
    """
    return [{name: _number(value) for name, value in record.items()} for record in read_records(path)]


def _number(value: Any) -> Any:
    """Convert text that `plain` wrote for a non-finite float back to a float; return anything else unchanged."""
    return float(value) if isinstance(value, str) and value in _NON_FINITE else value


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers, as floats."""
    values = {name: _number(value) for name, value in metrics.items()}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def _missing(setting: str, package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"{setting} needs the package {package}, which is not installed: "
        f"pip install 'atpo_fast[trackers]' (or pip install {package}), or switch the setting off"
    )
