"""Packing speed: 64 trees of 22 trajectories of 3,000 tokens, on one core.

    OMP_NUM_THREADS=1 pytest bench/packing --benchmark-only

Times are CPU time of the process. Reported beside: tokens packed, tokens of the flat batch, rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.tree import overlap
from bench.packing.cases import HOST, TREES, VOCAB
from bench.packing.forests import SEARCH_3000, random_forest
from bench.packing.measure import one_thread

pytestmark = pytest.mark.benchmark(timer=time.process_time)


@pytest.fixture(scope="module")
def trees() -> Iterator[list[TurnTree]]:
    """Draw the forest and assign its credit, once for the module."""
    with one_thread():
        yield random_forest(TREES, SEARCH_3000, VOCAB)


@pytest.mark.parametrize("step", ["ours", "packing", "block lists"])
def test_host_preparation(benchmark: Any, step: str) -> None:
    """Time packing and the attention's block lists, together and each by itself; the target is 150 ms together."""
    with one_thread():
        benchmark(HOST.makers("cpu")[step]())


@pytest.mark.parametrize("max_tokens", [16384, 65536], ids=["16k", "64k"])  # cut trees; whole trees
def test_pack_trees(benchmark: Any, trees: list[TurnTree], max_tokens: int) -> None:
    """Time `pack_trees` on 64 x 22 trajectories; the target is 100 ms."""
    rows = benchmark(pack_trees, trees, Objective.preset("at2po"), max_tokens)
    benchmark.extra_info |= {
        "rows": len(rows),
        "packed_tokens": sum(row.num_tokens for row in rows),
        "flat_tokens": sum(row.flat_tokens for row in rows),
        "overlap": round(overlap(trees), 3),
    }


def test_assign_credit(benchmark: Any, trees: list[TurnTree]) -> None:
    """Time the credit assignment of the same forest."""
    benchmark(assign_credit, trees)
