"""Rollouts under both schedules, and BM25 search on the real passages in $ATPO_DATA.

Runs of the quickstart take minutes each and are measured by `python -m bench quickstart-seeds` only.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bench.systems.streaming import SPEEDS, roll_out

DATA = os.environ.get("ATPO_DATA")
PASSAGES, SHARD_PASSAGES = 50_000, 250_000


@pytest.mark.parametrize("schedule", ["synchronous", "streaming"])
@pytest.mark.parametrize("speed", SPEEDS)
def test_streaming(benchmark: Any, speed: str, schedule: str) -> None:
    """Roll out 16 questions with tools that take 10 to 500 ms; the target of streaming is 1.5 times fewer seconds."""
    benchmark.group = f"streaming-{speed}"
    _, found = benchmark.pedantic(roll_out, args=(schedule, SPEEDS[speed]), rounds=1)
    benchmark.extra_info |= found


@pytest.mark.skipif(DATA is None, reason="ATPO_DATA does not name the folder with the real data sets")
def test_retrieval(benchmark: Any, tmp_path: Path) -> None:
    """Build an index of the sample's passages; reported beside: milliseconds a query, in process."""
    from bench.systems.retrieval import CORPUS, build_one

    arguments = (Path(str(DATA)) / CORPUS, PASSAGES, SHARD_PASSAGES, tmp_path)
    benchmark.extra_info |= benchmark.pedantic(build_one, args=arguments, rounds=1)
