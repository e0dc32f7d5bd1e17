"""Packing speed: 64 trees of 22 trajectories of 3,000 tokens, on one core.

    OMP_NUM_THREADS=1 pytest bench/bench_packing.py

Times are CPU time of the process. Reported beside: tokens packed, tokens of the flat batch, rows. Packing together with
the attention's block lists is a case of `run.py` (host_preparation).
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from forests import SEARCH_3000, random_forest

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.tree import overlap

TREES, VOCAB = 64, 150_000


@pytest.fixture(scope="module")
def trees() -> list[TurnTree]:
    """The forest, with credit."""
    torch.set_num_threads(1)
    return random_forest(TREES, SEARCH_3000, VOCAB)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("max_tokens", [16384, 65536], ids=["16k", "64k"])  # cut trees; whole trees
def test_pack_trees(benchmark: Any, trees: list[TurnTree], max_tokens: int) -> None:
    """`pack_trees` on 64 x 22 trajectories; the target is 100 ms."""
    rows = benchmark(pack_trees, trees, Objective.preset("at2po"), max_tokens)
    benchmark.extra_info |= {
        "rows": len(rows),
        "packed_tokens": sum(row.num_tokens for row in rows),
        "flat_tokens": sum(row.flat_tokens for row in rows),
        "overlap": round(overlap(trees), 3),
    }


@pytest.mark.benchmark(timer=time.process_time)
def test_assign_credit(benchmark: Any, trees: list[TurnTree]) -> None:
    """Credit of the same forest."""
    benchmark(assign_credit, trees)
