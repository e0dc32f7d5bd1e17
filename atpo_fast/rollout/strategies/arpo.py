"""ARPO's roll-out (arXiv:2507.19849): chains that branch after a tool's result where their entropy has risen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from atpo_fast.config import RolloutConfig
from atpo_fast.rollout.branch import BranchEnd, QuestionSearch, Start
from atpo_fast.rollout.strategies.base import OverLimit, Round, Strategy

_CANDIDATES = 10  # likeliest tokens that the entropy of a token is over (published)


@dataclass(slots=True, eq=False)
class Slot:
    """One chain of a question: where it stands, and the entropy of its own first turn."""

    turn: int  # its newest turn; 0 before its first
    active: bool = True  # whether it goes on
    entropy: float = 0.0  # opening entropy of the newest turn that it wrote itself
    first_entropy: float | None = None  # that of the first turn that it wrote itself


class EntropyBranching(Strategy):
    """Chains that each write one turn in a round; after the tools' results some of them branch.

    A branch is a chain of its own from there on. A question has `samples_per_tree` chains in the end: where none is
    active and there are fewer, a fresh one begins at the root. See docs/design.md#entropy-branching.
    """

    top_logprobs: ClassVar[int] = _CANDIDATES
    over_limit: ClassVar[OverLimit] = "eos"
    answers_bad_calls: ClassVar[bool] = False

    def __init__(self, rollout: RolloutConfig, search: QuestionSearch) -> None:
        super().__init__(rollout, search)
        self.chains = rollout.leaves_per_tree  # n: number of chains in the end
        self.slots: list[Slot] = []  # in order of creation
        self.rounds = 0  # rounds after which it was decided about branches

    def begin(self) -> Round:
        """Begin the initial chains."""
        return self.begin_chains(self.rollout.initial_chains)

    def begin_chains(self, count: int) -> Round:
        """Begin `count` chains at the root."""
        self.slots = [Slot(0) for _ in range(count)]
        return self._round()

    def next_round(self, ends: Sequence[BranchEnd]) -> Round | None:
        """Add branches and fresh chains, and let all active chains write their next turn."""
        for slot, end in zip(self._active(), ends, strict=True):
            slot.turn, slot.active, slot.entropy = end.turn, end.active, end.entropies[-1]
            if slot.first_entropy is None:
                slot.first_entropy = slot.entropy
        before = len(self.slots)
        self._branch()
        if not self._active() and len(self.slots) < self.chains:
            self.slots.append(Slot(0))
        self.added(len(self.slots) - before)
        return self._round() if self._active() else None

    def branches(self, draw: float, rise: float) -> bool:
        """Decide whether a chain branches, by a uniform draw and the rise in entropy since its own first turn."""
        value = draw - self.rollout.entropy_weight * rise
        return min(max(value, 0.0), 1.0) <= self.rollout.branch_threshold

    def added(self, chains: int) -> None:
        """Take note of how many chains a round has added."""

    def _branch(self) -> None:
        """Let every active chain try to branch, in order. A failed attempt is used up, the room is not."""
        generator = self.search.generator("branches", self.rounds)
        self.rounds += 1
        for slot in self._active():
            for _ in range(min(self.rollout.branch_attempts, self.chains - len(self.slots))):
                assert slot.first_entropy is not None
                if self.branches(float(generator.random()), slot.entropy - slot.first_entropy):
                    self.slots.append(Slot(slot.turn))

    def _active(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.active]

    def _round(self) -> Round:
        return Round(tuple(Start(slot.turn, turns=1) for slot in self._active()))
