"""AEPO's roll-out (arXiv:2510.14545): ARPO's with a bound on branching in a row, and with pre-monitoring."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

from atpo_fast.config import RolloutConfig
from atpo_fast.rollout.branch import BranchEnd, QuestionSearch, Start
from atpo_fast.rollout.strategies.arpo import EntropyBranching
from atpo_fast.rollout.strategies.base import Round

_PROBE_TOKENS = 50  # longest probe of the root (published)
_MONITOR_SLOPE = 0.5  # slope of the sigmoid in the number of first chains (published)


class BalancedBranching(EntropyBranching):
    """Entropy branching with a discount after rounds in a row with new chains (docs/design.md#entropy-branching).

    With `rollout.pre_monitoring` the first round is thrown away: a probe of the root and one whole chain, whose
    entropies decide how many chains begin.
    """

    def __init__(self, rollout: RolloutConfig, search: QuestionSearch) -> None:
        super().__init__(rollout, search)
        self.streak = 0  # rounds in a row in which the question got a new chain, fresh ones included
        self.monitoring = rollout.monitored  # whether the monitoring round is to come or in progress

    def begin(self) -> Round:
        """Begin the monitoring round, or the initial chains."""
        if not self.monitoring:
            return super().begin()
        return Round((Start(0, turns=1, tokens=_PROBE_TOKENS, calls=False), Start(0)), kept=False)

    def next_round(self, ends: Sequence[BranchEnd]) -> Round | None:
        """Begin the initial chains after the monitoring round; go on as ARPO does after the others."""
        if not self.monitoring:
            return super().next_round(ends)
        self.monitoring = False
        (root,), chain = ends[0].entropies, ends[1].entropies
        return self.begin_chains(monitored_chains(self.chains, root, sum(chain) / len(chain)))

    def branches(self, draw: float, rise: float) -> bool:
        """Decide as ARPO's mirror image does, with a discount that grows with the streak."""
        discount = max(0.0, 1.0 - self.rollout.streak_discount * self.streak)
        value = (draw + self.rollout.entropy_weight * rise) * discount
        return min(max(value, 0.0), 1.0) >= self.rollout.branch_threshold

    def added(self, chains: int) -> None:
        """Count the streak, or end it."""
        self.streak = self.streak + 1 if chains else 0


def monitored_chains(chains: int, root_entropy: float, chain_entropy: float) -> int:
    """Compute how many of a question's `chains` begin at the root: more where it is less sure than a chain's turns.

    `max(1, min(n, int(n * sigmoid(0.5 * (H_root - H_chain))) + 1))`, so n/2 + 1 for equal entropies.
    """
    share = 1.0 / (1.0 + exp(-_MONITOR_SLOPE * (root_entropy - chain_entropy)))
    return max(1, min(chains, int(chains * share) + 1))
