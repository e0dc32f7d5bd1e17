"""The Triton kernels of tree_attention against float64, on the GPU where there is one, else in the interpreter."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from atpo_kernels import tree_attention
from atpo_kernels.tree_attention import _choose as choose_attention
from atpo_kernels.tree_attention import launch, make_attention_blocks, tiles
from atpo_kernels.tree_attention.reference import AttentionOptions
from atpo_kernels.tree_attention.tiles import Tile, Tiles
from tests.helpers import interpreter  # noqa: F401  (repairs Triton's interpreter)
from tests.helpers.attention_precision import assert_precise
from tests.helpers.interpreter import DEVICE
from tests.helpers.kernel_cases import LargestOutput, NoHostSync
from tests.helpers.tree_cases import forward_backward, inputs, random_row, row_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LONG_ROW = pytest.mark.slow(reason="a long row, interpreted")
PLAIN = AttentionOptions(0.25)
SMALL = (Tile(32, 16, 4, 1, 1), Tile(32, 16, 4, 1, 1), Tile(32, 64, 4, 1, 1))


@pytest.fixture(params=[True, False], ids=["descriptors", "pointers"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to load what a loop runs over, whatever the dtype and device."""
    small = Tiles(*SMALL, descriptors=request.param)
    monkeypatch.setattr(launch, "tiles_for", lambda *_: small)


# a chain of turns (one stretch; its keys have full query blocks with partial ones before and behind), a star, several
# trees, and a comb: every turn has a leaf and goes on
ROWS = {
    "chain": row_of([60, 50, 40], [0, 1, 2]),
    "star": row_of([9, 1, 17, 2, 25], [0, 1, 1, 1, 1]),
    "trees": row_of([30, 1, 40, 5, 11], [0, 0, 0, 1, 1]),
    "comb": row_of([3, 5, 2, 30, 7, 9, 20], [0, 1, 1, 2, 2, 3, 3]),
    "single tokens": random_row(70, 1, 0),
}


# Every row with every dtype, both ways with each of them, and two key heads with each of them, both ways.
IN_TURN = [
    (row, dtype, (i + j) % 2 == 0, 1 + ((i + j) % 3 == 0))
    for (i, row), (j, dtype) in product(enumerate(ROWS), enumerate(DTYPES))
]


@pytest.mark.parametrize(("row", "dtype", "both_ways", "key_heads"), IN_TURN, indirect=["both_ways"], ids=str)
@pytest.mark.usefixtures("both_ways")
def test_as_precise_as_plain_pytorch(row: str, dtype: torch.dtype, key_heads: int) -> None:
    """Fails on any error in an index, a mask, a block list, the running sums or a gradient."""
    assert_precise(ROWS[row], (2 * key_heads, key_heads), 16, dtype)


# The widths that are padded both ways, as each way pads by itself; the others in turn.
SHAPES = [
    ((1, 1), 64, True), *product([(7, 1)], [80], [True, False]), *product([(3, 3)], [96], [True, False]),
    ((2, 1), 128, False), ((4, 1), 256, True),
]  # fmt: skip


@pytest.mark.parametrize(("heads", "width", "both_ways"), SHAPES, indirect=["both_ways"], ids=str)
@pytest.mark.usefixtures("both_ways")
def test_heads(heads: tuple[int, int], width: int) -> None:
    """Fails if a padded dimension, an idle row of a group of 7, or another head's keys get in."""
    assert_precise(random_row(40, 12, 1), heads, width, torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 150])
def test_lengths(tokens: int) -> None:
    """Fails if the last block of queries or keys, filled or not, is read or written behind its end."""
    assert_precise(random_row(tokens, 25, tokens), (2, 1), 16, torch.bfloat16)


@pytest.mark.parametrize(
    ("tokens", "prefix"),
    [(1, 1), (1, 64), (1, 65), (1, 200), (63, 1), (63, 63), (63, 64), (65, 63), (65, 65), (65, 200), (150, 65)],
)
def test_prefixes(tokens: int, prefix: int) -> None:
    """Fails if a query does not see all of the prefix, or gradients of the prefix or of the row lie elsewhere."""
    assert_precise(random_row(tokens, 25, tokens), (2, 1), 16, torch.float32, prefix=prefix)


@pytest.mark.usefixtures("both_ways")
def test_a_prefix_and_idle_rows() -> None:
    """Fails if the prefix is counted otherwise by descriptors, or shown to rows that hold no query."""
    assert_precise(random_row(41, 12, 1), (7, 1), 16, torch.bfloat16, prefix=70)


@LONG_ROW
def test_a_long_row() -> None:
    """Fails on errors that need many blocks, as in the order of work or the sums of pieces."""
    assert_precise(random_row(500, 90, 7), (2, 1), 16, torch.bfloat16)


@pytest.mark.parametrize("sharpness", [8.0, 60.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peaked_scores(dtype: torch.dtype, sharpness: float) -> None:
    """Fails if weights are taken before the peak is subtracted, or sums are not rescaled when it rises."""
    assert_precise(random_row(80, 15, 2), (2, 1), 16, dtype, sharpness=sharpness)


def test_scale_and_int64_ends() -> None:
    """Fails if `scale` reaches only one of the kernels."""
    end = random_row(60, 12, 3).to(DEVICE)
    tensors = inputs(60, (2, 1), 16, torch.float32, DEVICE)
    ours = forward_backward(tensors, end.long(), impl="triton", scale=0.7)
    for a, b in zip(ours, forward_backward(tensors, end, impl="reference", scale=0.7), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def attention_bits(tensors: list[Tensor], end: Tensor, layouts: int) -> None:
    """Fails unless the same numbers in another layout give the same bits."""
    plain = forward_backward(tensors, end, impl="triton")
    q, k, v, grad = (x.detach() for x in tensors)
    if layouts == 0:  # heads first, as transformers has them
        other = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, grad)]
    elif layouts == 1:  # parts of one projection
        joint = torch.cat([q, k, v], 1)
        other = [*joint.split([q.shape[1], k.shape[1], v.shape[1]], 1), grad.flip(0).flip(0)]
    else:  # last dimension apart; heads at odd distances; an odd address
        odd = torch.zeros(2, *v.shape[:2], v.shape[2] + 1, dtype=v.dtype, device=v.device)
        apart, shifted = odd[0, ..., :-1].copy_(k), odd[1, ..., 1:].copy_(v)
        other = [q.permute(2, 0, 1).contiguous().permute(1, 2, 0), apart, shifted, grad]
    other = [x.requires_grad_() if i < 3 else x for i, x in enumerate(x.detach() for x in other)]
    for a, b in zip(forward_backward(other, end, impl="triton"), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layouts", [0, 1, 2], ids=["heads first", "one projection", "unaligned"])
@pytest.mark.usefixtures("both_ways")
def test_strided_inputs(layouts: int) -> None:
    """Fails if a stride is ignored."""
    attention_bits(inputs(40, (4, 2), 16, torch.bfloat16, DEVICE), random_row(40, 12, 4).to(DEVICE), layouts)


def test_heads_first_inputs_are_not_copied() -> None:
    """Fails if what transformers hands over is copied in every layer, or what kernels cannot read is not."""
    end = random_row(64, 12, 4)
    q, k, v, _ = (x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in inputs(64, (4, 2), 16, DTYPES[0]))
    call = launch.Attention.prepare(q, k, v, None, end, PLAIN, None)
    assert [x.data_ptr() for x in (call.q, call.k, call.v)] == [x.data_ptr() for x in (q, k, v)]
    expanded = k[:, :1].expand(-1, 2, -1)  # heads at no distance: nothing for descriptors
    assert all(launch.Attention.prepare(q, expanded, v, None, end, PLAIN, None).k.stride())


def test_an_expanded_upstream_gradient() -> None:
    """Fails if the zero strides of sum().backward() are read as if they were contiguous."""
    end = random_row(40, 12, 4).to(DEVICE)
    grads = []
    for impl in ("triton", "reference"):
        q, k, v, _ = inputs(40, (2, 1), 16, torch.float32, DEVICE)
        grads.append(torch.autograd.grad(tree_attention(q, k, v, end, impl=impl).sum(), (q, k, v)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_same_bits_twice() -> None:
    """Fails if a sum depends on the order in which programs finish."""
    end, tensors = random_row(100, 20, 5).to(DEVICE), inputs(100, (2, 1), 16, torch.bfloat16, DEVICE)
    first, second = (forward_backward(tensors, end, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("prefix", [0, 20])
def test_given_blocks_nothing_waits_and_nothing_is_as_large_as_the_mask(prefix: int) -> None:
    """Fails if (T, T) is allocated, forward or backward, or a number is read from the device."""
    tokens = 256
    end, tensors = random_row(tokens, 60, 6), inputs(tokens, (1, 1), 16, torch.bfloat16, DEVICE, prefix)
    shape: dict[str, Any] = {"query_heads": 1, "key_heads": 1, "head_dim": 16, "dtype": torch.bfloat16}
    blocks = make_attention_blocks(end, **shape, device=DEVICE, impl="triton", prefix=prefix)
    with LargestOutput() as largest, NoHostSync():
        forward_backward(tensors, end.to(DEVICE), impl="triton", blocks=blocks)
    assert largest.elements < tokens * tokens // 2


@pytest.mark.parametrize("prefix", [0, 70])
def test_pieces_of_a_key_block_add_up(monkeypatch: pytest.MonkeyPatch, prefix: int) -> None:
    """Fails if the sums of pieces lose a part, or are written to another block's keys."""
    monkeypatch.setattr(launch, "processors", lambda _: 1000)
    end = row_of([40, 30, 30, 40], [0, 1, 1, 1])
    assert_precise(end, (2, 1), 16, torch.bfloat16, prefix=prefix)
    q, k, v, _ = inputs(140, (2, 1), 16, DTYPES[0])
    call = launch.Attention.prepare(q, k, v, None, end, PLAIN, None)
    assert call.blocks.slots > 4  # the monkeypatch has an effect


@pytest.mark.usefixtures("both_ways")
def test_offsets_beyond_32_bits() -> None:
    """Fails if an offset is computed in 32 bits: tokens so far apart that the last lie beyond 2^31 elements.

    Little of the memory is ever touched, so none of it is really taken.
    """
    end = random_row(66, 20, 8).to(DEVICE)
    near = inputs(66, (2, 1), 16, torch.bfloat16, DEVICE)
    plain = forward_backward(near, end, impl="triton")
    stride = 2**25 + 16
    memory = torch.empty(66 * stride, dtype=torch.bfloat16, device=DEVICE)
    far, at = [], 0
    for x in near:
        placed = memory.as_strided(x.shape, (stride, 16, 1), at).copy_(x.detach())
        far.append(placed.requires_grad_() if x.requires_grad else placed)
        at += 16 * x.shape[1]
    out = tree_attention(far[0], far[1], far[2], end, impl="triton")
    assert torch.equal(out, plain[0])
    grads = torch.autograd.grad(out, far[:3], far[3])
    assert all(torch.equal(a, b) for a, b in zip(grads, plain[1:], strict=True))


def test_no_tokens_keep_the_graph() -> None:
    """Fails if an empty row breaks: a rank without trees must still produce gradients."""
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    for prefix in (0, 3):
        leaves = inputs(0, (2, 1), 16, torch.bfloat16, DEVICE, prefix)[:3]
        tree_attention(leaves[0], leaves[1], leaves[2], none, impl="triton").sum().backward()
        assert all(x.grad is not None and x.grad.shape == x.shape and not x.grad.any() for x in leaves)


def test_errors_say_what_is_wrong() -> None:
    """Fails if a head that is too wide, too large a group, float64 or blocks for others reach the kernels."""
    end = random_row(20, 5, 0).to(DEVICE)

    def blocks(heads: int, dtype: torch.dtype = torch.float32, impl: str = "triton", prefix: int = 0) -> Any:
        return make_attention_blocks(
            end, query_heads=heads, key_heads=1, head_dim=16, dtype=dtype, impl=impl, prefix=prefix
        )

    cases = [
        ((1, 1), 257, torch.bfloat16, None, "at most 256 and 128 dimensions"),
        ((1, 1), 129, torch.float32, None, "at most 256 and 128 dimensions"),
        ((65, 1), 16, torch.float32, None, "query heads a key head"),
        ((1, 1), 16, torch.float64, None, "float64"),
        ((2, 1), 16, torch.float32, blocks(1), "make_attention_blocks for the same heads, dtype and softcap"),
        ((1, 1), 16, torch.float32, blocks(1, impl="torch"), "make_attention_blocks for the same heads"),
        ((1, 1), 16, torch.float32, blocks(1, prefix=4), "behind a prefix of 4"),
    ]
    for heads, width, dtype, given, message in cases:
        q, k, v, _ = inputs(20, heads, width, dtype, DEVICE)
        with pytest.raises(ValueError, match=message):
            tree_attention(q, k, v, end, impl="triton", blocks=given)
    q, k, v, _ = inputs(20, (1, 1), 16, torch.float32, DEVICE)
    with pytest.raises(ValueError, match="blocks for impl='torch'"):
        tree_attention(q, k, v, end, impl="torch", blocks=blocks(1))
    with pytest.raises(ValueError, match="scale must be positive"):
        tree_attention(q, k, v, end, scale=0.0)


def test_auto_passes_by_what_the_kernels_do_not_take() -> None:
    """Fails if float32 heads of 256 or float64 have nowhere to go on a GPU, or others go to PyTorch."""
    gpu = torch.device("cuda")
    for dtype, width, impl in (
        (torch.float32, 256, "torch"),
        (torch.float64, 64, "torch"),
        (torch.bfloat16, 257, "torch"),
        (torch.bfloat16, 256, "triton"),
    ):
        assert choose_attention("auto", gpu, dtype, width) is choose_attention(impl, gpu, dtype, width)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942", "cpu"])
def test_tables(target: str) -> None:
    """Fails if the two kernels that share lists have other tiles, or a common group of heads has no room."""
    for dtype in DTYPES:
        for width in (width for width in (64, 80, 96, 128, 256) if tiles.has_tiles(dtype, width)):
            found = tiles.tiles_for(target, dtype, width)
            assert found.forward[:2] == found.query_gradient[:2]
            assert all(tiles.block_sizes(found, group).queries * group <= found.forward.rows for group in range(1, 17))
