"""Attention over one row with a tree of 22 leaves, forward and backward, against its peers; the shortest row."""

from __future__ import annotations

from typing import Any

import pytest

from bench.attention.cases import CPU_ROW, ROWS, AttentionCase
from bench.core.case import Case
from bench.core.pytest_cases import DEVICE, parameters, run

SHORTEST = CPU_ROW if DEVICE == "cpu" else ROWS[0]


def shortest(case: AttentionCase) -> tuple[str, ...]:
    """Choose all implementations of forward and backward there."""
    return case.implementations if (case.mode, case.row_tokens) == ("gradient", SHORTEST) else ()


@pytest.mark.parametrize(("case", "name"), parameters(("tree_attention",), shortest))
def test_attention(benchmark: Any, case: Case, name: str) -> None:
    """Time an implementation's attention, forward and backward."""
    run(benchmark, case, name, rounds=3)
