"""Windows, sinks and soft caps in the Triton kernels of tree_attention, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atpo_kernels import tree_attention
from atpo_kernels.tree_attention import launch, make_attention_blocks
from atpo_kernels.tree_attention.tiles import Tile, Tiles
from tests.helpers import interpreter  # noqa: F401  (repairs Triton's interpreter)
from tests.helpers.attention_precision import assert_precise
from tests.helpers.interpreter import DEVICE
from tests.helpers.kernel_cases import NoHostSync
from tests.helpers.tree_cases import forward_backward, inputs, random_row, row_of

HALF, SINGLE = torch.bfloat16, torch.float32
SINKS = [-1.0, 0.5, 2.0, 0.0]
# a fork between a long branch and a short one: the queries behind it see keys that the first ones do not any more
FORK = row_of([30, 60, 5, 20, 7], [0, 1, 1, 1, 0])


@pytest.fixture(params=[True, False], ids=["descriptors", "pointers"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to load what a loop runs over, more workers than pieces, so that key blocks are cut, and gradients of
    sinks in several blocks of queries."""
    tiles = (Tile(32, 16, 4, 1, 1), Tile(32, 16, 4, 1, 1), Tile(32, 32, 4, 1, 1))
    small = Tiles(*tiles, descriptors=request.param)
    monkeypatch.setattr(launch, "tiles_for", lambda *_: small)
    monkeypatch.setattr(launch, "processors", lambda _: 100)
    monkeypatch.setattr(launch, "SINK_QUERIES", 16)


# of blocks of 16 keys and of 32, and of paths of 95 tokens: within one, at their borders, over several, over all; the
# two ways in turn, so that each meets short and long windows and a prefix
WINDOWS = [(1, 0), (9, 0), (32, 0), (50, 0), (1000, 0), (9, 40), (50, 40)]


@pytest.mark.parametrize(
    ("window", "prefix", "both_ways"),
    [(*case, i % 2 == 0) for i, case in enumerate(WINDOWS)],
    indirect=["both_ways"],
    ids=str,
)
@pytest.mark.usefixtures("both_ways")
def test_windows(window: int, prefix: int) -> None:
    """Fails if a block that a window cuts is taken as full, a reached one is left out, or keys that no query reaches
    any more, as those of the prefix, get another gradient than 0."""
    assert_precise(FORK, (2, 1), 16, SINGLE, window=window, prefix=prefix)


@pytest.mark.parametrize("dtype", [HALF, torch.float16, SINGLE], ids=str)
@pytest.mark.parametrize("window", [None, 20])
def test_sinks(dtype: torch.dtype, window: int | None) -> None:
    """Fails if a sink is that of another head, in other units than the scores, or its gradient misses queries."""
    assert_precise(random_row(70, 15, 1), (4, 2), 16, dtype, window=window, sinks=SINKS, prefix=3)


def test_a_query_alone_in_the_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the gradient of a sink leaves that query out, which half precision would hide."""
    monkeypatch.setattr(launch, "SINK_QUERIES", 16)
    assert_precise(random_row(17, 5, 1), (2, 1), 16, SINGLE, sinks=[0.5, -1.0])


@pytest.mark.parametrize("low", [-80.0, -1e30])
def test_sinks_far_from_all_scores(low: float) -> None:
    """Fails if the sums overflow or are lost where a sink has no weight, or nearly all of it."""
    assert_precise(random_row(40, 15, 1), (2, 1), 16, SINGLE, sinks=[low, 80.0])


def test_a_sink_at_minus_infinity_is_none() -> None:
    """Fails if infinity minus itself is taken: NaN."""
    end, tensors = random_row(40, 15, 1).to(DEVICE), inputs(40, (2, 1), 16, SINGLE, DEVICE)
    sinks = torch.full((2,), float("-inf"), device=DEVICE).requires_grad_()
    *ours, of_sinks = forward_backward(tensors, end, impl="triton", sinks=sinks)
    for a, b in zip(ours, forward_backward(tensors, end, impl="triton"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not of_sinks.any()


# scores of about 1, of 8 and of 60, under caps that hardly bend them and that hold nearly all of them
@pytest.mark.parametrize(("sharpness", "softcap"), [(1.0, 50.0), (1.0, 0.5), (8.0, 5.0), (60.0, 20.0)])
@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_soft_caps(dtype: torch.dtype, sharpness: float, softcap: float) -> None:
    """Fails if the cap or its slope is left out, comes after the mask, or tanh is imprecise near 0 or near 1."""
    assert_precise(random_row(70, 15, 2), (2, 1), 16, dtype, sharpness=sharpness, softcap=softcap)


@pytest.mark.parametrize(("heads", "width"), [((7, 1), 80), ((3, 3), 24)])
@pytest.mark.usefixtures("both_ways")
def test_all_at_once_at_odd_shapes(heads: tuple[int, int], width: int) -> None:
    """Fails if idle rows of a group of 7 take the sink of another head, or padded dimensions get in."""
    sinks = torch.linspace(-2, 3, heads[0]).tolist()
    assert_precise(random_row(33, 12, 1), heads, width, HALF, window=17, sinks=sinks, softcap=3.0, prefix=33)


def test_given_blocks_nothing_waits_and_bits_repeat() -> None:
    """Fails if a window or a sink is read from the device, or a sum depends on the order in which programs finish."""
    end, tensors = random_row(100, 20, 5), inputs(100, (2, 1), 16, HALF, DEVICE)
    options: dict[str, Any] = {"window": 30, "softcap": 2.0}
    blocks = make_attention_blocks(
        end, query_heads=2, key_heads=1, head_dim=16, dtype=HALF, device=DEVICE, impl="triton", **options
    )
    sinks = torch.tensor([0.5, -1.0], dtype=HALF, device=DEVICE).requires_grad_()
    on_device = end.to(DEVICE)
    with NoHostSync():
        first, second = (
            forward_backward(tensors, on_device, impl="triton", blocks=blocks, sinks=sinks, **options) for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_tokens_keep_the_graph() -> None:
    """Fails if an empty row breaks: a rank without trees must still produce gradients."""
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    for prefix in (0, 3):
        leaves = inputs(0, (2, 1), 16, HALF, DEVICE, prefix)[:3]
        sinks = torch.zeros(2, device=DEVICE).requires_grad_()
        q, k, v = leaves
        out = tree_attention(q, k, v, none, impl="triton", window=2, sinks=sinks, softcap=2.0)
        out.sum().backward()
        assert all(x.grad is not None and x.grad.shape == x.shape and not x.grad.any() for x in [*leaves, sinks])
