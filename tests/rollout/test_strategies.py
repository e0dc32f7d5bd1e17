"""What strategies have in common: their registry, and what one class of a user's own can decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pytest

from atpo_fast.common.choices import Strategy as StrategyName
from atpo_fast.rollout.branch import BranchEnd, Start
from atpo_fast.rollout.strategies import STRATEGIES, Round, Strategy
from tests.helpers.scripted_engine import ScriptedEngine, make_search, questions, roll_out, search_then_answer


def test_every_name_has_a_class() -> None:
    # Fails if a strategy can be configured but not rolled out.
    assert set(STRATEGIES) == set(get_args(StrategyName))


class TwoAnswers(Strategy):
    """One search, to whose result two answers are written; before it a probe, which is thrown away."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self.ends: list[list[BranchEnd]] = []
        SEEN.append(self)

    def begin(self) -> Round:
        return Round((Start(0, turns=1, tokens=2, calls=False),), kept=False)

    def next_round(self, ends: Sequence[BranchEnd]) -> Round | None:
        self.ends.append(list(ends))
        if len(self.ends) == 1:
            return Round((Start(0, turns=1),))
        return Round.of([ends[0].turn] * 2) if len(self.ends) == 2 else None


SEEN: list[TwoAnswers] = []


@pytest.mark.parametrize("schedule", ["synchronous", "streaming"])
def test_a_strategy_is_one_class(monkeypatch: pytest.MonkeyPatch, schedule: str) -> None:
    # Fails if the loop knows a strategy's name, goes on in a branch that should pause, keeps what is thrown away, or
    # asks for candidates unasked.
    SEEN.clear()
    monkeypatch.setitem(STRATEGIES, "chain", TwoAnswers)
    engine = ScriptedEngine(search_then_answer)
    (tree,) = roll_out(make_search(engine, strategy="chain", initial_chains=2, schedule=schedule), questions(1))
    assert [turn.parent for turn in tree.turns] == [-1, 0, 1, 1]
    probe, search, answers = SEEN[0].ends
    assert probe == [BranchEnd(0, False, ())] and search == [BranchEnd(1, True, ())]
    assert answers == [BranchEnd(2, False, ()), BranchEnd(3, False, ())]
    sampling = [request.sampling for batch in engine.batches for request in batch]
    assert sampling[0].max_new_tokens == 2 and not any(one.top_logprobs for one in sampling)
