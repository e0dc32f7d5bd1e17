"""The Triton kernels of linear_logprob against float64, on the GPU where there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch

from atpo_kernels import checks, linear_logprob
from atpo_kernels.linear_logprob import launch, tiles
from atpo_kernels.linear_logprob.tiles import Tile, vocab_splits
from tests.helpers import interpreter  # noqa: F401  (repairs Triton's interpreter)
from tests.helpers.error_bounds import assert_no_less_precise, head_bounds
from tests.helpers.interpreter import DEVICE
from tests.helpers.kernel_cases import LargestOutput, NoHostSync, random_head, run_head, upstream

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# (rows, width, vocabulary): one of everything; one tile, filled (of the interpreter's 16 x 64 x 32); several row tiles,
# steps and ranges of the vocabulary, none filled; rows of an odd number of bytes, which are copied; more rows than a
# group of row tiles
SIZES = [(1, 1, 1), (16, 32, 64), (37, 40, 150), (21, 35, 97), (70, 16, 65)]
# How tiles are moved: by descriptors (Hopper and later) or through pointers.
DESCRIBED, POINTERS = (Tile(16, 64, 32, num_warps=4, num_stages=2, descriptors=d, group=2) for d in (True, False))


@pytest.fixture(params=[DESCRIBED, POINTERS], ids=["descriptors", "pointers"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tile:
    """Both ways to move tiles, whatever the dtype and device."""
    monkeypatch.setattr(launch, "tile_for", lambda *_: request.param)
    return request.param


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients in chunks of one row tile."""
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 0)


@pytest.mark.parametrize(("rows", "width", "vocab"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_as_precise_as_plain_pytorch(tile: Tile, dtype: torch.dtype, rows: int, width: int, vocab: int) -> None:
    """Fails on any error in an index, a mask, the running sums, the merge of ranges, the gradient or a chunk border."""
    bias = (DTYPES.index(dtype) + SIZES.index((rows, width, vocab)) + tile.descriptors) % 2 == 0  # with each, in turn
    head = random_head(rows, width, vocab, peak=4.0).rounded(dtype)
    exact, ours, plain = (
        run_head(head, d, impl, bias=bias)
        for d, impl in ((torch.float64, "reference"), (dtype, "triton"), (dtype, "reference"))
    )
    assert [x.dtype for x in ours] == [torch.float32] * 2 + [dtype] * (len(ours) - 2)
    bounds = head_bounds(head, exact, upstream(len(head.targets)), dtype, temperature=0.7, stored=True)
    for e, o, p, bound in zip(exact, ours, plain, bounds, strict=True):
        assert_no_less_precise(p, o, e, bound)


# standard deviation of the logits: random weights, a trained model, one in which most probabilities underflow
@pytest.mark.parametrize("peak", [1.0, 8.0, 60.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peaked_logits(dtype: torch.dtype, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if exponentials are taken before the peak is subtracted, or a sum is not rescaled when the peak rises."""
    monkeypatch.setattr(launch, "processors", lambda *_: 2)  # two ranges of the vocabulary, of two tiles each
    head = random_head(48, 32, 200, peak=peak, seed=3).rounded(dtype)
    exact, ours, plain = (
        run_head(head, d, impl) for d, impl in ((torch.float64, "reference"), (dtype, "triton"), (dtype, "reference"))
    )
    bounds = head_bounds(head, exact, upstream(len(head.targets)), dtype, temperature=0.7, stored=True)
    for e, o, p, bound in zip(exact, ours, plain, bounds, strict=True):
        assert_no_less_precise(p, o, e, bound)
    if dtype != torch.float32:
        # the bar of the head: a clip range of 3e-3 has no room for logits rounded to half precision
        error = (ours[0] - exact[0]).abs() / max(1.0, peak / 8)
        assert error.mean() <= 1e-5 and error.max() <= 1e-4


def test_same_bits_twice() -> None:
    """Fails if a sum depends on the order in which programs finish."""
    head = random_head(40, 24, 130)
    for first, second in zip(
        run_head(head, torch.bfloat16, "triton"), run_head(head, torch.bfloat16, "triton"), strict=True
    ):
        assert torch.equal(first, second)


@pytest.mark.usefixtures("tile", "small_chunks")
def test_nothing_as_large_as_the_logits_and_no_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if any step allocates (A, V), forward or backward, or reads a number from the device."""
    monkeypatch.setattr(checks, "_check_targets", lambda *_: None)  # reads the targets, on the CPU only
    head = random_head(160, 8, 640)
    with LargestOutput() as largest, NoHostSync(), torch.no_grad():
        hidden, weight = (x.bfloat16().to(DEVICE) for x in (head.hidden, head.weight))
        linear_logprob(hidden, weight, head.targets.to(DEVICE), impl="triton")
    assert largest.elements <= 160 * 640 // 10
    with LargestOutput() as largest, NoHostSync():
        run_head(head, torch.bfloat16, "triton")
    assert largest.elements <= 16 * 640


def test_one_output_alone_and_a_frozen_weight() -> None:
    """Fails if a missing upstream gradient is taken for ones, or a frozen weight costs a product."""
    head = random_head(6, 8, 9).rounded(torch.float32)
    for which in (0, 1):
        grads = []
        for impl in ("triton", "reference"):
            hidden = head.hidden.float().to(DEVICE).requires_grad_()
            weight, targets = head.weight.float().to(DEVICE), head.targets.to(DEVICE)
            out = linear_logprob(hidden, weight, targets, impl=impl)[which]
            grads.append(torch.autograd.grad(out.sum() * 3, hidden)[0])
        torch.testing.assert_close(*grads)


def test_strided_inputs() -> None:
    """Fails if a stride is ignored: rows apart, the last dimension apart, a tensor that starts at an odd address."""
    head = random_head(20, 16, 70).rounded(torch.bfloat16)
    hidden, weight, targets = (
        head.hidden.bfloat16().to(DEVICE),
        head.weight.bfloat16().to(DEVICE),
        head.targets.to(DEVICE),
    )
    plain = linear_logprob(hidden, weight, targets, impl="triton")
    wide = torch.zeros(20, 40, dtype=torch.bfloat16, device=DEVICE)
    for start in (8, 1):
        wide[:, start : start + 16] = hidden
        apart = linear_logprob(wide[:, start : start + 16], weight.T.contiguous().T, targets.int(), impl="triton")
        assert all(torch.equal(a, b) for a, b in zip(apart, plain, strict=True))


def test_no_rows_keep_the_graph() -> None:
    """Fails if an empty batch breaks: a rank without action tokens must still produce (zero) gradients."""
    leaves = [x.to(DEVICE).detach().requires_grad_() for x in random_head(3, 8, 9).leaves(torch.bfloat16)]
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    logprob, entropy = linear_logprob(leaves[0][:0], leaves[1], none, bias=leaves[2], impl="triton")
    (logprob.sum() + entropy.sum()).backward()
    assert logprob.shape == entropy.shape == (0,)
    assert all(x.grad is not None and not x.grad.any() for x in leaves)


@pytest.mark.usefixtures("tile")
def test_offsets_beyond_32_bits() -> None:
    """Fails if an offset is computed in 32 bits: rows so far apart that the last lies beyond 2^31 elements.

    Little of the memory is ever touched, so none of it is really taken.
    """
    head = random_head(40, 16, 66).rounded(torch.bfloat16)
    stride = 2**26 + 16  # the third tile of rows begins at row 32
    far = torch.empty(40 * stride, dtype=torch.bfloat16, device=DEVICE)
    hidden, targets = far.as_strided((40, 16), (stride, 1)), head.targets.to(DEVICE)
    hidden.copy_(head.hidden)
    weight = head.weight.bfloat16().to(DEVICE)
    near = linear_logprob(hidden.contiguous(), weight, targets, impl="triton")
    assert all(
        torch.equal(a, b) for a, b in zip(linear_logprob(hidden, weight, targets, impl="triton"), near, strict=True)
    )


def test_errors() -> None:
    """Fails if float64 is silently computed in float32."""
    head = random_head(4, 8, 5)
    with pytest.raises(ValueError, match="float64"):
        linear_logprob(head.hidden.to(DEVICE), head.weight.to(DEVICE), head.targets.to(DEVICE), impl="triton")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_ranges_of_the_vocabulary(target: str) -> None:
    """Fails if a range is empty, or one wave of programs leaves processors idle that more ranges would use."""
    tile = tiles.tile_for(target, torch.bfloat16)
    for rows in (1, 128, 3000, 16384, 10**6):
        for vocab in (1, 32000, 151936):
            splits = vocab_splits(rows, vocab, tile, 132)
            column_tiles, row_tiles = -(-vocab // tile.columns), -(-rows // tile.rows)
            assert 1 <= splits <= min(64, column_tiles)
            waves = -(-row_tiles * splits // 132)
            busy = row_tiles * column_tiles / (132 * waves * -(-column_tiles // splits))
            assert busy >= 0.9 or row_tiles * min(64, column_tiles) < 10 * 132
