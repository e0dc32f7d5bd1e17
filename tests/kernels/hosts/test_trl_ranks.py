"""Real training by TRL: accumulation and ranks, as processes of a group, change nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("trl")

from tests.helpers.forked_runs import ForkedProcess, finish
from tests.helpers.trl_ranks import LOSSES, write_all_weights

pytestmark = pytest.mark.distributed


def test_accumulation_and_ranks(tmp_path: Path) -> None:
    """Fails if two micro-batches or two ranks train other weights than one batch of one process.

    num_iterations=2: the second step is off-policy, so that the ratio and its clip count.
    """
    finish(ForkedProcess(write_all_weights, tmp_path))
    for loss_type in LOSSES:
        whole, accumulated, two_ranks = (
            dict(np.load(tmp_path / f"{loss_type}_{name}.npz")) for name in ("4_1_1", "2_2_1", "2_1_2")
        )
        trained = [name for name in whole if not name.startswith("before ")]
        moved = max(np.abs(whole[name] - whole[f"before {name}"]).max() for name in trained)
        assert moved > 1e-3
        for found in (accumulated, two_ranks):
            gap = max(np.abs(found[name] - whole[name]).max() for name in trained)
            assert gap < 1e-4 * moved, (loss_type, gap, moved)  # float32, two steps of which the second begins there
