"""A layer and the whole update of trees with an overlap of 0.8, against flat rows; `python -m bench` has all cases."""

from __future__ import annotations

from typing import Any

import pytest

from bench.core.case import Case
from bench.core.pytest_cases import parameters, run
from bench.update.cases import ModelCase


def most_shared(case: ModelCase) -> tuple[str, ...]:
    """Choose ours, and flat rows with our operators."""
    return ("ours", "flat") if case.overlap == 0.8 else ()


@pytest.mark.parametrize(("case", "name"), parameters(("decoder_layer", "policy_update"), most_shared))
def test_update(benchmark: Any, case: Case, name: str) -> None:
    """Time a decoder layer or a whole update in one layout."""
    run(benchmark, case, name, rounds=2)
