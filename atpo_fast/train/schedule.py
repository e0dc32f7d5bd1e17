"""Which questions are rolled out next and with which seed: functions of a place in one endless order of questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atpo_fast.data.questions import Question


@dataclass(frozen=True, slots=True)
class Draw:
    """The questions that all ranks roll out together: `count` of them, from place `first` of the order of questions."""

    step: int  # the step that they are for
    first: int
    count: int
    refill: int = 0  # number of roll-outs before this one in the same step


def draw_questions(questions: Sequence[Question], seed: int, first: int, count: int) -> list[Question]:
    """Return the questions at places `first` to `first + count - 1` of a seeded permutation, another one every epoch.

    Raises ValueError when there is none.
    """
    if not questions:
        raise ValueError(
            "there are no training questions: set data.train_files (evaluation questions are dropped from them)"
        )
    epochs, offsets = np.divmod(np.arange(first, first + count), len(questions))
    drawn: list[Question] = []
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, int(epoch)]).permutation(len(questions))
        drawn += [questions[i] for i in order[offsets[epochs == epoch]]]
    return drawn


def sampling_seed(seed: int, draw: Draw) -> int:
    """Return the seed that a draw is sampled with.

    Every refill has its own, so that a question which comes again in the same step is sampled afresh.
    """
    parts = [seed, draw.step, draw.refill] if draw.refill else [seed, draw.step]
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
