"""This rank's part of each batch of search trees: rolled out when wanted, or a step ahead while the policy learns.

A batch that was begun ahead is sampled by the weights of the step before it: its staleness is 1. One thread rolls out;
the engine belongs to it until `join`, so weights are synced only after that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from threading import Thread

from atpo_fast.common.errors import StopRequested
from atpo_fast.data.questions import Question
from atpo_fast.telemetry import PhaseTimer
from atpo_fast.train.rollout_worker import RolloutWorker, ScoredTree


@dataclass(slots=True)
class Batch:
    """Trees of one step."""

    step: int
    weights_step: int  # steps that the policy had learned when it sampled them
    trees: list[ScoredTree] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)  # of the engine
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)  # seconds by phase, where it was rolled out ahead
    error: BaseException | None = None

    @property
    def staleness(self) -> int:
        """Steps by which the weights that sampled it are older than those that learn from it."""
        return self.step - self.weights_step


class Rollouts:
    """Batches, one at a time.

    Args:
        worker: rolls out.
        questions: this rank's questions of a step.
        seed: of a step.
    """

    def __init__(
        self, worker: RolloutWorker, questions: Callable[[int], Sequence[Question]], seed: Callable[[int], int]
    ):
        self._worker, self._questions, self._seed = worker, questions, seed
        self._ahead: tuple[Batch, Thread] | None = None

    def begin(self, step: int, weights_step: int) -> None:
        """Roll out a later step's batch while the caller goes on; `join` before the engine is used otherwise."""
        batch = Batch(step, weights_step)
        thread = Thread(target=self._roll_out, args=(batch, PhaseTimer()), name=f"rollout-{step}", daemon=True)
        self._ahead = batch, thread
        thread.start()

    def join(self) -> None:
        """Wait for the batch that was begun, which is kept for `take`."""
        if self._ahead is not None:
            self._ahead[1].join()

    def take(self, step: int) -> Batch:
        """The batch of a step: the one begun ahead, or a new one. Raises what its roll-out raised."""
        self.join()
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0].step == step:
            batch = ahead[0]
        else:
            batch = Batch(step, weights_step=step)
            self._roll_out(batch, None)
        if batch.error is not None:
            raise batch.error
        return batch

    def _roll_out(self, batch: Batch, timer: PhaseTimer | None) -> None:
        begun, before = time.monotonic(), asdict(self._worker.engine.counters)
        try:
            batch.trees = self._worker.roll_out(self._questions(batch.step), seed=self._seed(batch.step), timer=timer)
        except StopRequested:
            pass  # the ranks have to find out together
        except BaseException as error:
            batch.error = error
        batch.seconds = time.monotonic() - begun
        batch.counts = {name: count - before[name] for name, count in asdict(self._worker.engine.counters).items()}
        batch.phases = timer.pop() if timer is not None else {}
