"""Time of a step from what an earlier run took: its configuration, and the steps of its metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from atpo_fast.common.errors import InputError
from atpo_fast.config import Config, load_config
from atpo_fast.telemetry.run_logger import METRICS_FILE, read_metrics
from atpo_fast.train.plan.sizes import ModelSize, model_size

_UPDATE = ("pack", "logprob", "update")
_ROLLOUT = ("rollout", "rollout_wait")


@dataclass(frozen=True, slots=True)
class Measured:
    """A run's mean step.

    Attributes:
        folder: folder of the run.
        steps: number of steps that the means are of.
        size: sizes of its model.
        trajectories: number of leaves of a step.
        ranks: number of its ranks.
        update, rollout, rest: seconds of a step.
        trained, decoded: tokens of a step, over all ranks.
    """

    folder: Path
    steps: int
    size: ModelSize
    trajectories: int
    ranks: int
    update: float
    rollout: float
    rest: float
    trained: float
    decoded: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """Predicted seconds of a step, and its tokens over all ranks."""

    update: float
    rollout: float
    rest: float
    trained: float
    decoded: float

    @property
    def seconds(self) -> float:
        """All of the step."""
        return self.update + self.rollout + self.rest


def read_measured(folder: Path) -> Measured:
    """Read the mean step of a run. Raises InputError where the folder holds no finished step."""
    path = folder / METRICS_FILE
    if not path.is_file():
        raise InputError(
            f"--like={folder}: no {METRICS_FILE} there; give the folder of a run that has taken some steps"
        )
    records = [record for record in read_metrics(path) if record["phase"] == "train"]
    if not records:
        raise InputError(f"--like={folder}: {METRICS_FILE} has no finished step of `atpo-fast train`")
    config = load_config(folder / "config.yaml")
    records = records[1:] or records  # the first step warms up

    def mean(names: tuple[str, ...]) -> float:
        return fmean(sum(record.get(name, 0.0) for name in names) for record in records)

    update, rollout = (mean(tuple(f"time/{name}" for name in names)) for names in (_UPDATE, _ROLLOUT))
    return Measured(
        folder,
        len(records),
        model_size(config),
        config.train.questions_per_step * config.rollout.leaves,
        max(1, config.ranks),
        update,
        rollout,
        max(0.0, mean(("time/total",)) - update - rollout),
        mean(("tokens/trained",)),
        mean(("tokens/decoded",)),
    )


def step_time(like: Measured, config: Config, size: ModelSize, ranks: int) -> StepTime:
    """Predict a step from a measured one on devices of the same kind.

    Trajectories are taken to be as long as there. Times of update and rollout grow with tokens times parameters and
    shrink with ranks; the rest (credit, sync, logging) with neither.
    """
    trajectories = config.train.questions_per_step * config.rollout.leaves / like.trajectories
    factor = trajectories * size.parameters / like.size.parameters * like.ranks / ranks
    return StepTime(
        like.update * factor, like.rollout * factor, like.rest, like.trained * trajectories, like.decoded * trajectories
    )
