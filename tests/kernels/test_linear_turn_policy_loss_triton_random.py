"""linear_turn_policy_loss on Triton kernels over random turns; apart, because it needs Hypothesis."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from atpo_kernels.choices import ClipFamily, RatioLevel
from atpo_kernels.linear_logprob import launch
from atpo_kernels.linear_logprob.tiles import Tile
from tests.helpers import interpreter  # noqa: F401  (repairs Triton's interpreter)
from tests.helpers.error_bounds import assert_within
from tests.helpers.interpreter import DEVICE
from tests.helpers.kernel_cases import loss_case, run_linear_loss
from tests.helpers.turn_loss_cases import linear_loss_bounds

pytest.importorskip("hypothesis")

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

CHUNK = 16


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Any:
    """Chunks of one tile of 16 rows, on every device."""
    with pytest.MonkeyPatch.context() as patch:
        tile = Tile(CHUNK, 64, 32, num_warps=4, num_stages=2, descriptors=True, group=2)
        patch.setattr(launch, "tile_for", lambda *_: tile)
        patch.setattr(launch, "SCRATCH_BYTES", 0)
        yield


@settings(
    max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)  # shrinking takes minutes
@given(
    lengths=st.lists(st.integers(0, 2 * CHUNK + 3), min_size=1, max_size=6),
    level=st.sampled_from(get_args(RatioLevel)),
    clip=st.sampled_from(get_args(ClipFamily)),
    extra=st.sampled_from([{}, {"kl": "k3", "kl_coef": 0.2}, {"entropy_coef": 0.1}, {"importance_cap": 1.1}]),
    seed=st.integers(0, 99),
)
def test_equals_the_definition(lengths: list[int], level: Any, clip: Any, extra: dict[str, Any], seed: int) -> None:
    """Fails if a chunk border cuts a turn, a long turn is treated as two, or a dropped row had a gradient."""
    head, keywords = loss_case(lengths, width=8, vocab=20, seed=seed)
    head, config = head.rounded(torch.float32), {"level": level, "clip": clip, "clip_low": 0.1, **extra}
    ours, exact = (
        run_linear_loss(head, keywords, dtype, DEVICE, impl=impl, **config)
        for dtype, impl in ((torch.float32, "triton"), (torch.float64, "reference"))
    )
    bounds = linear_loss_bounds(head, keywords, exact, torch.float32, **config)
    for o, e, bound in zip(ours, exact, bounds, strict=True):
        assert_within(o, e, bound.worst)
