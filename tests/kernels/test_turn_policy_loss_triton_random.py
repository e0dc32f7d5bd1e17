"""turn_policy_loss on Triton kernels over random turns; apart, because it needs Hypothesis."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from atpo_kernels.choices import ClipFamily, RatioLevel, Reduction
from atpo_kernels.turn_policy_loss import tiles
from tests.helpers import interpreter  # noqa: F401  (repairs Triton's interpreter)
from tests.helpers.interpreter import DEVICE
from tests.helpers.turn_loss_cases import EVERY_TERM, assert_precise, packed_case, padded_case

pytest.importorskip("hypothesis")

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

BLOCK = 16
# A failure is reported as it was found: to shrink it would take minutes in the interpreter.
QUICK = settings(max_examples=30, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
SEEDS = st.integers(0, 99)


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Any:
    """Blocks of 16 tokens on every device."""
    with pytest.MonkeyPatch.context() as patch:
        for table in (tiles._PACKED_BLOCKS, tiles._PADDED_BLOCKS):
            patch.setitem(table, DEVICE, ((BLOCK, 1),))
        yield


@QUICK
@given(
    lengths=st.lists(st.one_of(st.integers(0, 2), st.integers(0, 3 * BLOCK)), max_size=7),
    level=st.sampled_from(get_args(RatioLevel)),
    clip=st.sampled_from(get_args(ClipFamily)),
    cap=st.sampled_from([None, 1.3]),
    seed=SEEDS,
)
def test_random_packed_turns(lengths: list[int], level: Any, clip: Any, cap: float | None, seed: int) -> None:
    """Fails if a turn (empty, of one token, longer than a block, the last) is summed or averaged wrongly."""
    assert_precise(packed_case(lengths, seed), level=level, clip=clip, dual_cap=cap, **EVERY_TERM)


@QUICK
@given(
    runs=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 2 * BLOCK)), max_size=6),
    by_ids=st.booleans(),
    level=st.sampled_from(get_args(RatioLevel)),
    reduction=st.sampled_from(get_args(Reduction)),
    seed=SEEDS,
)
def test_random_runs(runs: list[tuple[int, int]], by_ids: bool, level: Any, reduction: Any, seed: int) -> None:
    """Fails if a run (at an edge, next to another, over a block's border) is cut, joined or averaged wrongly."""
    gaps, sizes = [gap for gap, _ in runs], [size for _, size in runs]
    length = sum(gaps) + sum(sizes)
    case = padded_case(2, length, seed)
    case["mask"][1] = torch.cat([torch.arange(g + s) >= g for g, s in runs] or [torch.ones(0, dtype=torch.bool)])
    if by_ids:
        # turns of a few runs each, or of parts of one
        every = 1 + seed % 20
        case["turn_ids"] = (torch.arange(length) // every).flip(0).expand(2, length)
    assert_precise(case, level=level, reduction=reduction, entropy_coef=0.1)
