"""Packing speed: 64 trees of 22 trajectories of about 3,000 tokens, on one core.

    OMP_NUM_THREADS=1 pytest bench/bench_packing.py

Times are CPU time of the process. Reported beside: tokens packed, tokens of the flat batch, rows.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.tree import overlap

TREES, CHAINS, EXPANSIONS, TURNS = 64, 10, 12, 4
PROMPT, ACTION, OBSERVATION = 900, 150, 500  # the last turn has no observation: 900 + 4 x 150 + 3 x 500 = 3,000 tokens


def search_tree(rng: np.random.Generator) -> TurnTree:
    """A tree of the published search: 10 chains, then 12 turns re-sampled as siblings and run to their ends."""
    tree = TurnTree(rng.integers(0, 150_000, PROMPT))

    def run_chain(parent: int, depth: int) -> list[int]:
        chain = []
        for turn in range(depth, TURNS):
            action = rng.integers(0, 150_000, ACTION)
            observation = rng.integers(0, 150_000, OBSERVATION if turn < TURNS - 1 else 0)
            parent = tree.add_turn(parent, action, -rng.random(ACTION), observation)
            chain.append(parent)
        return chain

    inner = [(turn, depth) for _ in range(CHAINS) for depth, turn in enumerate(run_chain(0, 0)[:-1])]
    for _ in range(EXPANSIONS):
        turn, depth = inner[rng.integers(len(inner))]
        inner += [(n, depth + i) for i, n in enumerate(run_chain(tree.turns[turn].parent, depth)[:-1])]
    for leaf in tree.leaves:
        tree.set_reward(leaf, float(rng.random() < 0.5))
    return tree


@pytest.fixture(scope="module")
def trees() -> list[TurnTree]:
    """The forest, with credit."""
    torch.set_num_threads(1)
    forest = [search_tree(np.random.default_rng(seed)) for seed in range(TREES)]
    assign_credit(forest)
    return forest


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
