"""Turns as a record has them, and the search trees that they make up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from atpo_fast.tree.turn_tree import TurnTree


@dataclass(frozen=True, slots=True)
class RecordedTurn:
    """Tokens that the policy sampled, and those before them that it did not.

    `parent` is the index of the turn whose action is continued, None for a turn that answers the prompt. `context_ids`
    (c,) are the tokens between the two actions, of the first turn the prompt. `action_ids` (a,), with their `logprobs`
    (a,), are empty for an answer of the environment behind which nothing was written.
    """

    parent: int | None
    context_ids: tuple[int, ...]
    action_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(slots=True)
class Episode:
    """The turns of one recorded rollout, parents before children, and its reward."""

    question_id: str
    turns: list[RecordedTurn]
    reward: float
    meta: dict[str, Any] = field(default_factory=dict)


def grow_trees(episodes: Sequence[Episode]) -> list[TurnTree]:
    """Make search trees: one for each question and prompt, in the order in which they come first.

    Rollouts of a question with the same prompt are branches of one tree. All leaves of a rollout get its reward. A turn
    of a tree has one observation; where those that follow it saw different ones, each is that of a turn without action
    in between.
    """
    trees: dict[tuple[str, tuple[int, ...]], TurnTree] = {}
    for episode in episodes:
        for index, turn in enumerate(episode.turns):
            if turn.parent is None:
                key = episode.question_id, turn.context_ids
                if key not in trees:
                    trees[key] = TurnTree(turn.context_ids, question_id=episode.question_id, meta=episode.meta)
                _add(trees[key], 0, episode, index)
    return list(trees.values())


def _add(tree: TurnTree, parent: int, episode: Episode, index: int) -> None:
    """Add a turn of an episode and all that follow it under `parent`; not recursive, since chains are long."""
    following: dict[int | None, list[int]] = {}
    for number, turn in enumerate(episode.turns):
        following.setdefault(turn.parent, []).append(number)
    waiting = [(parent, index)]
    while waiting:
        parent, index = waiting.pop()
        turn, then = episode.turns[index], following.get(index, [])
        observations = {episode.turns[child].context_ids for child in then}
        shared = observations.pop() if len(observations) == 1 else ()
        here = tree.add_turn(parent, turn.action_ids, turn.logprobs, shared)
        then = [] if [episode.turns[child].action_ids for child in then] == [()] else then
        if not then:
            tree.set_reward(here, episode.reward)
        for child in reversed(then):
            apart = here if shared else _answer_alone(tree, here, episode.turns[child])
            if apart != here and not episode.turns[child].action_ids:
                tree.set_reward(apart, episode.reward)
            else:
                waiting.append((apart, child))


def _answer_alone(tree: TurnTree, parent: int, turn: RecordedTurn) -> int:
    """Add a turn without action that observed what stands before `turn`; returns `parent` where that is nothing."""
    return tree.add_turn(parent, [], [], turn.context_ids) if turn.context_ids else parent
