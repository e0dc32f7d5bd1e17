"""The turn loss from given log-probs, forward and backward, against plain PyTorch and the published loop."""

from __future__ import annotations

from typing import Any

import pytest
from case import Case
from pytest_cases import of_head, parameters, run


@pytest.mark.parametrize(("case", "name"), parameters("turn_policy_loss", of_head))
def test_turn_policy_loss(benchmark: Any, case: Case, name: str) -> None:
    run(benchmark, case, name)
