"""A layer, and the whole update, of trees with an overlap of 0.8 against flat rows; `run.py` has the other cases."""

from __future__ import annotations

from typing import Any

import pytest
from case import Case
from pytest_cases import parameters, run


def most_shared(case: Case) -> tuple[str, ...]:
    """Ours and flat rows with our operators."""
    return ("ours", "flat") if case.overlap == 0.8 else ()  # type: ignore[attr-defined]


CASES = [*parameters("decoder_layer", most_shared), *parameters("policy_update", most_shared)]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_policy_update(benchmark: Any, case: Case, name: str) -> None:
    run(benchmark, case, name, rounds=2)
