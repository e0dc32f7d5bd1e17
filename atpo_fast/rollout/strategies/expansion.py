"""Strategies of AT²PO: rounds of expansion (`entropy`, `random`), chains alone, and the one chain of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from atpo_fast.config import RolloutConfig
from atpo_fast.rollout.branch import BranchEnd, QuestionSearch
from atpo_fast.rollout.expansion import select_turns
from atpo_fast.rollout.strategies.base import Round, Strategy
from atpo_fast.tree.turn_tree import TurnTree


class Chains(Strategy):
    """Chains from the root, and nothing after them."""

    def begin(self) -> Round:
        """Begin `initial_chains` chains."""
        return Round.of([0] * self.rollout.initial_chains)

    def next_round(self, ends: Sequence[BranchEnd]) -> Round | None:
        """End the tree."""
        return None


class OneChain(Chains):
    """A single chain, whatever the shape of the search is: for evaluation."""

    def begin(self) -> Round:
        """Begin the chain."""
        return Round.of([0])

    def finish(self) -> TurnTree:
        """Return the chain."""
        return self.search.tree


class EntropyExpansion(Chains):
    """Chains, then rounds that re-sample turns: each gets a new sibling, whose branch runs to its end.

    Where no turn can be chosen, the round is left out. See docs/design.md#search.
    """

    order: ClassVar[Literal["entropy", "random"]] = "entropy"

    def __init__(self, rollout: RolloutConfig, search: QuestionSearch) -> None:
        super().__init__(rollout, search)
        self.rounds_left = rollout.expansion_rounds

    @property
    def returns(self) -> bool:
        """Whether a round of expansion is left."""
        return self.rounds_left > 0

    def next_round(self, ends: Sequence[BranchEnd]) -> Round | None:
        """Begin a branch after the parent of each turn to re-sample."""
        while self.rounds_left:
            self.rounds_left -= 1
            tree = self.search.tree
            turns = select_turns(
                tree,
                self.rollout.expansions_per_round,
                strategy=self.order,
                branch_penalty=self.rollout.branch_penalty,
                rng=self.search.rng,
            )
            if turns:
                return Round.of(max(tree.turns[turn].parent, 0) for turn in turns)
        return None


class RandomExpansion(EntropyExpansion):
    """As `EntropyExpansion`, with turns drawn uniformly."""

    order: ClassVar[Literal["entropy", "random"]] = "random"
