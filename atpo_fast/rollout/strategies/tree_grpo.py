"""Tree-GRPO's roll-out (arXiv:2509.21240): random trees whose new branches continue from turns drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from atpo_fast.config import RolloutConfig
from atpo_fast.rollout.branch import BranchEnd, QuestionSearch
from atpo_fast.rollout.strategies.base import OverLimit, Round
from atpo_fast.rollout.strategies.expansion import Chains


class RandomChildren(Chains):
    """Chains, then rounds in which turns are drawn and each gets a new child (docs/design.md#tree-grpo).

    Turns are drawn uniformly and with replacement from the root and all turns that are not leaves. The new branch
    continues after the turn's observation, so the same evidence may be answered once more. After as many calls as
    `tools.call_limit` allows on a path, one more turn is written, which is a leaf whatever it says.
    """

    over_limit: ClassVar[OverLimit] = "end"

    def __init__(self, rollout: RolloutConfig, search: QuestionSearch) -> None:
        super().__init__(rollout, search)
        self.rounds = 0

    @property
    def returns(self) -> bool:
        """Whether a round of expansion is left."""
        return self.rounds < self.rollout.expansion_rounds

    def next_round(self, ends: Sequence[BranchEnd]) -> Round | None:
        """Draw the turns that get a child."""
        count = self.rollout.expansions_per_round
        if self.rounds == self.rollout.expansion_rounds or not count:
            return None
        turns = self.search.tree.turns
        candidates = [0, *(number for number in range(1, len(turns)) if turns[number].children)]
        generator = self.search.generator("children", self.rounds)
        self.rounds += 1
        return Round.of(candidates[place] for place in generator.integers(len(candidates), size=count).tolist())
