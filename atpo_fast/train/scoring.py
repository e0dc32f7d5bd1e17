"""The scoring station of a run: rewards for the leaves of unscored trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atpo_fast.data.questions import Question
from atpo_fast.environment.reward import LeafScore, score_trees
from atpo_fast.train.run import Run
from atpo_fast.tree import TurnTree


@dataclass(slots=True)
class ScoredTree:
    """A tree whose leaves have rewards, with its question and the score of each leaf in the order of `tree.leaves`."""

    question: Question
    tree: TurnTree
    scores: list[LeafScore]


def score(
    run: Run, questions: Sequence[Question], trees: Sequence[TurnTree], *, validation: bool = False
) -> list[ScoredTree]:
    """Score every leaf of every tree by the run's reward, and set its reward on the tree.

    Args:
        questions: `questions[i]` belongs to `trees[i]`.
        validation: a broken format costs nothing, as the published evaluation has it.
    """
    with run.timer.phase("score"):
        scores = score_trees(trees, questions, run.task.tokenizer, run.config.reward, validation=validation)
    return [ScoredTree(*parts) for parts in zip(questions, trees, scores, strict=True)]
