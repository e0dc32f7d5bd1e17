"""Log-prob and entropy from hidden states, with and without gradient, against the peers."""

from __future__ import annotations

from typing import Any

import pytest
from case import Case
from pytest_cases import of_head, parameters, run


@pytest.mark.parametrize(("case", "name"), parameters("linear_logprob", of_head))
def test_linear_logprob(benchmark: Any, case: Case, name: str) -> None:
    run(benchmark, case, name)
