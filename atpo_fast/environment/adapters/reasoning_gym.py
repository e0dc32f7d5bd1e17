"""Problems of reasoning-gym (`pip install reasoning-gym`), generated from the seed of the session.

Columns of a question's record: `dataset` as for `reasoning_gym.create_dataset`, and `dataset_options` (optional).
One answer ends the episode.
"""

from __future__ import annotations

import copy
from typing import Any

from atpo_fast.environment.adapters.common import column, package, small_seed
from atpo_fast.environment.session import Result, Session


class ReasoningGymSession(Session):
    """A session over one problem of a data set; the problem is the opening."""

    def __init__(self, dataset: Any, index: int):
        self._dataset = dataset
        self._problem = dataset[index]
        self.opening = self._problem["question"]

    def step(self, text: str) -> Result:
        """Answer: what stands in `<answer>` tags, or else the whole text."""
        utilities = package("reasoning_gym", "reasoning-gym", "reasoning_gym.utils")
        answer = utilities.extract_answer(text, tag_name="answer") or text.strip()
        reward = self._dataset.score_answer(answer, self._problem)
        return Result("", float(reward), done=True)

    def fork(self) -> ReasoningGymSession:
        """Return another session over the same problem: answers change nothing."""
        return copy.copy(self)


def open_session(task: dict[str, Any], seed: int) -> ReasoningGymSession:
    """Generate the problem: equal seeds give equal problems."""
    reasoning_gym = package("reasoning_gym", "reasoning-gym")
    options = {"size": 1, "seed": small_seed(seed)} | task.get("dataset_options", {})
    index = seed % options["size"]
    return ReasoningGymSession(reasoning_gym.create_dataset(column(task, "dataset"), **options), index)
