"""Log-prob and entropy from hidden states, with and without gradient, against the peers."""

from __future__ import annotations

from typing import Any

import pytest
from cases import Case
from pytest_cases import parameters, run


@pytest.mark.parametrize(("case", "name"), parameters("linear_logprob"))
def test_linear_logprob(benchmark: Any, case: Case, name: str) -> None:
    run(benchmark, case, name)
