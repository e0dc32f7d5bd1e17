"""The head operators, with and without gradient, against their peers; sweeps of the turn loss."""

from __future__ import annotations

from typing import Any

import pytest

from bench.core.case import Case
from bench.core.pytest_cases import parameters, run
from bench.head.cases import CPU_RECORD, HeadCase


def affordable(case: HeadCase) -> tuple[str, ...]:
    """Choose all implementations; of the large CPU shape ours and plain PyTorch, in one case for each operator."""
    if case.shape != CPU_RECORD:
        return case.implementations
    return case.implementations[:2] if case.quick else ()


CASES = parameters(("linear_logprob", "linear_turn_policy_loss", "turn_policy_loss"), affordable)


@pytest.mark.parametrize(("case", "name"), CASES)
def test_head(benchmark: Any, case: Case, name: str) -> None:
    """Time an implementation of an operator of the head."""
    run(benchmark, case, name, rounds=2 if case.fields()["shape"] == CPU_RECORD else 10)
