"""Which questions a step takes and with which seed: functions of the step number, so resuming needs nothing more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from atpo_fast.config import Config
from atpo_fast.data.questions import Question


def draw_questions(questions: Sequence[Question], config: Config, step: int) -> list[Question]:
    """Draw the questions of a step: `train.questions_per_step` of a seeded permutation, another one every epoch.

    Raises ValueError when there is none.
    """
    if not questions:
        raise ValueError(
            "there are no training questions: set data.train_files (evaluation questions are dropped from them)"
        )
    size = config.train.questions_per_step
    epochs, offsets = np.divmod(np.arange(step * size, (step + 1) * size), len(questions))
    drawn: list[Question] = []
    for epoch in np.unique(epochs):
        order = np.random.default_rng([config.seed, int(epoch)]).permutation(len(questions))
        drawn += [questions[i] for i in order[offsets[epochs == epoch]]]
    return drawn


def step_seed(seed: int, step: int) -> int:
    """Return the seed of a step's sampling."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
