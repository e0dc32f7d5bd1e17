"""Begin the sessions of a roll-out: one for each question, whose opening becomes part of the prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from atpo_fast.data.questions import Question
from atpo_fast.environment.sessions import Sessions, StateTree, task_of
from atpo_fast.rollout.branch import hashed


def begin_sessions(sessions: Sessions, questions: Sequence[Question], seed: int) -> list[StateTree]:
    """Open the first session of each question, side by side.

    Its seed follows from `seed`, the question's id, and how many equal ids came before.
    """
    seen: Counter[str] = Counter()
    tasks = []
    for question in questions:
        tasks.append((question.id, task_of(question), hashed(seed, question.id, seen[question.id], "session")))
        seen[question.id] += 1
    return sessions.begin(tasks)
