"""The scoring station of a run: rewards for the leaves of unscored trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atpo_fast.data.questions import Question
from atpo_fast.environment.reward import LeafScore, score_trees
from atpo_fast.train.run import Run
from atpo_fast.train.sampler import Batch
from atpo_fast.tree import TurnTree


@dataclass(slots=True)
class ScoredTree:
    """A tree whose leaves have rewards, with its question and the score of each leaf in the order of `tree.leaves`."""

    question: Question
    tree: TurnTree
    scores: list[LeafScore]


@dataclass(slots=True)
class Group:
    """The scored trees of one question, whose trajectories are compared with each other."""

    place: int  # place of the question in the order of questions (`Draw`)
    weights_step: int  # number of steps that the policy had learned when it sampled the trees
    trees: list[ScoredTree]


def score_batch(run: Run, batch: Batch) -> list[Group]:
    """Score the trees of this rank's questions: a group for each, in their order."""
    questions = [question for question, trees in zip(batch.questions, batch.trees, strict=True) for _ in trees]
    scored = iter(score(run, questions, [tree for trees in batch.trees for tree in trees]))
    return [
        Group(batch.draw.first + run.rank + i * run.world, batch.weights_step, [next(scored) for _ in trees])
        for i, trees in enumerate(batch.trees)
    ]


def score(
    run: Run, questions: Sequence[Question], trees: Sequence[TurnTree], *, validation: bool = False
) -> list[ScoredTree]:
    """Score every leaf of every tree by the rewards of the run's task, and set its reward on the tree.

    Args:
        questions: `questions[i]` belongs to `trees[i]`.
        validation: neither a broken format nor length costs anything, as the published evaluation has it.

    Raises:
        RewardError: a reward failed on a trajectory, and its failures end the run.
    """
    with run.timer.phase("score"):
        scores = score_trees(
            trees,
            questions,
            run.task.tokenizer,
            run.config.reward,
            rules=run.task.rules,
            validation=validation,
            max_response_tokens=run.config.rollout.max_response_tokens,
        )
    return [ScoredTree(*parts) for parts in zip(questions, trees, scores, strict=True)]
