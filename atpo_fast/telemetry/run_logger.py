"""Metrics of a run: metrics.jsonl always, TensorBoard and Weights & Biases when the configuration asks for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from atpo_fast.common.jsonl import append_records, keep_records, plain, read_records
from atpo_fast.config import Config, as_dict

_LOG = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TREES_FILE = "trees.jsonl"
_NON_FINITE = {"nan", "inf", "-inf"}


class _Sink(Protocol):
    """A destination of metric records: a file or a tracker."""

    def write(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class RunLogger:
    """The metric records of a run; every method does nothing on ranks that are not `is_main`.

    A record is `{"phase": "cold_start" | "train" | "eval", "step": int, "time": Unix seconds, ...metrics}`. Once the
    logger exists, a failure to write (a full disk, a lost connection) is reported once on stderr and never raised.

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
        self._sinks: dict[str, _Sink] = {}
        self._failed: set[str] = set()
        if not is_main:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._sinks[METRICS_FILE] = _JsonLines(self.run_dir / METRICS_FILE)
        if config.logging.tensorboard:
            self._sinks["TensorBoard"] = _TensorBoard(self.run_dir / "tensorboard")
        if config.logging.wandb_project:
            self._sinks["Weights & Biases"] = _WandB(config.logging.wandb_project, self.run_dir, as_dict(config))

    def log(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one record. Values: numbers, strings, one-element tensors (taken as float)."""
        values = {name: plain(value) for name, value in metrics.items()}
        for name, sink in self._sinks.items():
            self._guarded(name, partial(sink.write, phase, step, values))

    def truncate_after(self, step: int, phases: Sequence[str] = ("train", "eval")) -> None:
        """Remove what was written for later steps than `step`, the step of the checkpoint being resumed.

        Drops the records of `phases` from metrics.jsonl, and the later trees from trees.jsonl. A start from
        nothing is `truncate_after(-1, ("cold_start", "train", "eval"))`. TensorBoard hides overtaken points by itself.
        """
        if METRICS_FILE not in self._sinks:
            return
        self._keep(METRICS_FILE, lambda record: record.get("phase") not in phases or record.get("step", 0) <= step)
        self._keep(TREES_FILE, lambda record: record.get("step", 0) <= step)

    def close(self) -> None:
        """Finish the trackers; the logger writes nothing afterwards."""
        for name, sink in self._sinks.items():
            self._guarded(name, sink.close)
        self._sinks = {}

    def _keep(self, file: str, keep: Callable[[dict[str, Any]], bool]) -> None:
        path = self.run_dir / file
        if path.exists():
            self._guarded(file, lambda: keep_records(path, keep))

    def _guarded(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker raises, the run goes on
            if name not in self._failed:
                self._failed.add(name)
                _LOG.warning("logging to %s of %s failed (%s); training goes on", name, self.run_dir, error)


class _JsonLines:
    """The sink that appends records to metrics.jsonl, one a line."""

    def __init__(self, path: Path):
        self._path = path

    def write(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        append_records(self._path, [{"phase": phase, "step": int(step), "time": time.time(), **metrics}])

    def close(self) -> None:
        """Do nothing: the file is not kept open between records."""


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
