"""What a strategy decides: which branches begin in a round, how far each goes, and what is kept of the tree.

A strategy is one class. It is built for each tree, is asked for the first round, and after each round for the next. It
sees only what is in the tree and what the branches report, and draws from generators of the question's own, so neither
the schedule nor the tools' times can change what it decides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from atpo_fast.config import RolloutConfig
from atpo_fast.rollout.branch import BranchEnd, QuestionSearch, Start
from atpo_fast.rollout.expansion import keep_leaves
from atpo_fast.tree.turn_tree import TurnTree

OverLimit = Literal["notice", "eos", "end"]


@dataclass(frozen=True, slots=True)
class Round:
    """The branches that grow together, and whether their turns enter the tree."""

    starts: tuple[Start, ...]
    kept: bool = True

    @classmethod
    def of(cls, turns: Iterable[int]) -> Round:
        """Begin a branch after each of `turns`, which runs to its end."""
        return cls(tuple(Start(turn) for turn in turns))


class Strategy(ABC):
    """The way in which one tree grows. A subclass says what begins (`begin`) and what follows (`next_round`).

    Args:
        rollout: shape of the search.
        search: the tree, and the generators of the question's random numbers (`QuestionSearch.generator`).
    """

    top_logprobs: ClassVar[int] = 0
    """Number of likeliest candidates whose log-probs are asked for with each token; with them turns get an
    `opening_entropy`."""

    over_limit: ClassVar[OverLimit] = "notice"
    """What answers a call over the limit. notice: a text, after which the policy may answer. eos: nothing, but the end
    token is appended to the turn's action. end: nothing."""

    answers_bad_calls: ClassVar[bool] = True
    """Whether a call that cannot be read is answered with its problem; otherwise its turn ends the chain."""

    def __init__(self, rollout: RolloutConfig, search: QuestionSearch) -> None:
        self.rollout, self.search = rollout, search

    @abstractmethod
    def begin(self) -> Round:
        """Say what the first round begins with."""

    @abstractmethod
    def next_round(self, ends: Sequence[BranchEnd]) -> Round | None:
        """Say what follows a round, whose branches ended as `ends` says, in their order; None: the tree is done."""

    @property
    def returns(self) -> bool:
        """Whether a later round may continue turns that are not the newest of their branches."""
        return False

    def finish(self) -> TurnTree:
        """Return the finished tree with the leaves that are kept."""
        return keep_leaves(self.search.tree, self.rollout.leaves_per_tree, self.search.rng)
