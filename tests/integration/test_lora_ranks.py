"""Adapters under DeepSpeed: equal gradients and weights on any number of ranks, and nothing else in the optimizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.forked_runs import fork_ranks
from tests.helpers.lora_ranks import CASES, Case, adapted_policy, write_results

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the results of every case on 1 and on 2 ranks."""
    folder = tmp_path_factory.mktemp("lora")
    for ranks in (1, 2):
        fork_ranks(write_results, ranks, folder)
    return folder


# Fails if a frozen weight or an adapter is partitioned when it is used, a gradient is averaged or lost on a way, an
# adapter is merged from its shard or begins otherwise on another rank, or the optimizer keeps state of frozen weights.
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_and_stages_agree(results: Path, case: Case, ranks: int) -> None:
    expected = dict(np.load(results / "0_4096_none_1.npz"))
    found = dict(np.load(results / f"{'_'.join(map(str, case))}_{ranks}.npz"))
    assert found.keys() == expected.keys()
    gradients = [name for name in expected if name.startswith("gradient ")]
    assert len(gradients) == 28 and all(".lora_" in name for name in gradients)
    assert max(np.abs(expected[name]).max() for name in gradients) > 1e-3
    for name in gradients:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=5e-6 * scale, err_msg=name)
    for name in expected.keys() - {*gradients, "state"}:
        assert np.array_equal(found[name], expected[name]), name
    adapters = sum(p.numel() for p in adapted_policy().parameters() if p.requires_grad)
    shares = ranks if case[0] else 1
    padding = 2 * (28 if case[0] == 3 else 2)  # elements: of every parameter under ZeRO-3, of all of them under ZeRO-2
    assert 2 * adapters / shares <= found["state"] <= 2 * adapters / shares + padding
