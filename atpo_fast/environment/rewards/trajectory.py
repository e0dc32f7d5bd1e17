"""A trajectory as a reward sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from atpo_fast.data.questions import Question
from atpo_fast.tree.turn_tree import TokenIds


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """What the policy did on the way to one leaf of a search tree.

    Attributes:
        question: question with its accepted answers (`answers`) and the record of the data file (`record`).
        prompt: prompt as the model has read it.
        response: everything after the prompt, results of tools included.
        written: what the policy wrote, after what the chat template has begun the reply with; where a tool has
            answered stand empty result tags.
        answer: answer that `task.answer` reads from it, or None.
        em: exact match of the answer, 0 or 1, 0 without one.
        f1: F1 of the answer, likewise.
        format_ok: whether the format holds.
        turns: number of turns.
        tool_calls: number of turns that called a tool.
        token_ids: (t,) tokens after the prompt, results included.
        validation: whether it belongs to an evaluation.
        leaf: number of the leaf in its tree.
        fault: rule of the format that is broken, if one is.
        score: score that the environment gave the trajectory; None without one.
        turn_rewards: sum of what the environment gave for its turns.
    """

    question: Question
    prompt: str
    response: str
    written: str
    answer: str | None
    em: float
    f1: float
    format_ok: bool
    turns: int
    tool_calls: int
    token_ids: TokenIds = field(compare=False)
    validation: bool
    leaf: int
    fault: str | None = None
    score: float | None = None
    turn_rewards: float = 0.0

    @property
    def tokens(self) -> int:
        """Number of tokens after the prompt, results included."""
        return len(self.token_ids)
