"""Attention over one row with a tree of 22 leaves, forward and backward, against the peers; the shortest row."""

from __future__ import annotations

from typing import Any

import pytest
from attention_cases import CPU_ROW, ROWS
from case import Case
from pytest_cases import DEVICE, parameters, run

SHORTEST = CPU_ROW if DEVICE == "cpu" else ROWS[0]


def shortest(case: Case) -> tuple[str, ...]:
    """All implementations of forward and backward there."""
    chosen = (case.mode, case.row_tokens) == ("gradient", SHORTEST)  # type: ignore[attr-defined]
    return case.implementations if chosen else ()


@pytest.mark.parametrize(("case", "name"), parameters("tree_attention", shortest))
def test_tree_attention(benchmark: Any, case: Case, name: str) -> None:
    run(benchmark, case, name, rounds=3)
