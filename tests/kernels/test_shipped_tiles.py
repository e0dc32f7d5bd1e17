"""Every tile that is shipped, at sizes that fill none of them: on a GPU all of its generation's, in Triton's
interpreter a few of those for sm_90.

Other tests of the kernels take small tiles, so that small inputs have several; what a GPU runs are these.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from atpo_kernels import TokenWeights
from atpo_kernels.linear_logprob import launch as head_launch
from atpo_kernels.linear_turn_policy_loss import tiles as fused_tiles
from atpo_kernels.tree_attention import launch as attention_launch
from bench.attention import candidates as attention_candidates
from bench.head import candidates
from tests.helpers import interpreter  # noqa: F401  (repairs Triton's interpreter)
from tests.helpers.attention_precision import assert_precise
from tests.helpers.error_bounds import assert_within, head_bounds
from tests.helpers.interpreter import DEVICE, INTERPRETED
from tests.helpers.kernel_cases import loss_case, random_head, run_head, run_linear_loss, upstream
from tests.helpers.tree_cases import random_row
from tests.helpers.turn_loss_cases import linear_loss_bounds

on_gpu = pytest.mark.skipif(INTERPRETED, reason="the interpreter would take hours")
HALF, SINGLE = torch.bfloat16, torch.float32
DTYPES = (HALF, torch.float16, SINGLE)
# rows, width, words: none a multiple of a tile's, and more than one tile of each
HEAD, SMALL_HEAD = (1000, 1032, 5003), (131, 72, 259)
ROWS = ((1, 0), (63, 65), (700, 0), (700, 131))  # tokens, and cached ones before them
OPTIONS: dict[str, Any] = {"window": 50, "softcap": 2.0, "sinks": True}
WIDTHS, GROUPS = (16, 64, 80, 96, 128, 256), (1, 2, 3, 4, 5, 7)


@pytest.fixture(autouse=True)
def tiles_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, the tiles for sm_90."""
    if INTERPRETED:
        monkeypatch.setattr(head_launch, "target_of", lambda _: "sm_90")
        monkeypatch.setattr(attention_launch, "target_of", lambda _: "sm_90")
        monkeypatch.setitem(fused_tiles.GRADIENT_TILES, "cpu", fused_tiles.GRADIENT_TILES["gpu"])


def check_head(size: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> None:
    """Log-probs, entropies and gradients through both are as near to float64 as roundings allow."""
    head = random_head(*size, peak=4.0).rounded(dtype)
    exact, ours = (run_head(head, d, impl, bias=bias) for d, impl in ((torch.float64, "reference"), (dtype, "triton")))
    bounds = head_bounds(head, exact, upstream(size[0]), dtype, temperature=0.7, stored=True)
    for value, truth, bound in zip(ours, exact, bounds, strict=True):
        assert_within(value, truth, 2 * bound.worst)  # tensor cores add towards zero: up to twice an error of rounding


def check_loss(size: tuple[int, int, int], dtype: torch.dtype, clipped: float, turn: int, **more: Any) -> None:
    """The fused loss, with a share of its turns clipped, is as near to float64 as roundings allow."""
    rows, width, vocab = size
    lengths = [turn] * (rows // turn) + [rows % turn]
    head, keywords = loss_case(lengths, width=width, vocab=vocab, seed=3, peak=2.0)
    head = head.rounded(dtype)
    apart = torch.zeros(len(lengths))
    apart[: round(clipped * len(lengths))] = 1.0  # the ratio of these turns is e
    keywords["old_logprob"] = keywords["logprob"] - apart.repeat_interleave(torch.tensor(lengths))
    keywords["weights"] = TokenWeights(*torch.tensor([1.0, 0.0, 1.0])[:, None].expand(3, rows))
    exact, ours = (
        run_linear_loss(head, keywords, d, DEVICE, impl=impl, clip_low=0.1, clip_high=0.1, **more)
        for d, impl in ((torch.float64, "reference"), (dtype, "triton"))
    )
    bounds = linear_loss_bounds(head, keywords, exact, dtype, clip_low=0.1, clip_high=0.1, **more)
    for value, truth, bound in zip(ours, exact, bounds, strict=True):
        assert_within(value, truth, 2 * bound.worst)


KEY_HEADS = 1 if DEVICE == "cpu" else 2  # of interpreted attention one, as another only takes as long again


def check_attention(tokens: int, width: int, group: int, prefix: int, dtype: torch.dtype, **options: Any) -> None:
    """Output and gradients are as near to float64 as roundings allow."""
    sinks = [0.5] * KEY_HEADS * group if options.pop("sinks", False) else None
    end, heads = random_row(tokens, 90, 1), (KEY_HEADS * group, KEY_HEADS)
    assert_precise(end, heads, width, dtype, prefix=prefix, sinks=sinks, beside_plain=False, **options)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head(dtype: torch.dtype, bias: bool) -> None:
    """Fails if a tile of the GPU goes wrong at its border, with or without a bias, through log-prob or entropy."""
    check_head(HEAD, dtype, bias)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("clipped", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("chunk", [128, 384, 4096])  # turns of 300 rows: in two passes, in chunks, in one chunk
def test_fused_loss(chunk: int, clipped: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if chunks, skipped rows, or gradients in place of the exponentials go wrong on tiles of the GPU."""
    monkeypatch.setattr(head_launch, "SCRATCH_BYTES", chunk * 5056 * 2)
    check_loss(HEAD, HALF, clipped, 300)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_loss_with_entropy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the gradient through the entropy goes wrong, in one pass or in two."""
    monkeypatch.setattr(head_launch, "SCRATCH_BYTES", 384 * 5056 * 2)
    check_loss(HEAD, dtype, 0.5, 77, entropy_coef=0.1)
    check_loss(HEAD, dtype, 0.5, 700, entropy_coef=0.1)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("width", "group"), [*product(WIDTHS, (4, 7)), *product((128,), GROUPS)])
def test_attention(width: int, group: int) -> None:
    """Fails if a width or a group of heads goes wrong at the border of a tile of the GPU, also behind a prefix."""
    for tokens, prefix in ROWS:
        check_attention(tokens, width, group, prefix, HALF)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("width", WIDTHS[:-1])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_attention_of_other_dtypes(dtype: torch.dtype, width: int) -> None:
    """Fails if float16 or float32 goes wrong."""
    check_attention(333, width, 4, 65, dtype)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("width", "options"), [(64, OPTIONS), (128, {"window": 50}), (128, OPTIONS), (256, OPTIONS)])
def test_attention_with_options(width: int, options: dict[str, Any]) -> None:
    """Fails if a window, sinks or a soft cap go wrong at the border of a tile of the GPU, also behind a prefix."""
    for tokens, prefix in ((63, 65), (700, 131)):
        check_attention(tokens, width, 7, prefix, HALF, **options)


interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the tests above run all of them")


@interpreted
@pytest.mark.parametrize(("dtype", "bias"), [(HALF, True), (SINGLE, False)], ids=str)
def test_head_interpreted(dtype: torch.dtype, bias: bool) -> None:
    """Fails if a tile for sm_90 has sizes with which the kernels calculate wrongly."""
    check_head(SMALL_HEAD, dtype, bias)


@interpreted
@pytest.mark.parametrize(("turn", "clipped"), [(40, 0.5), (131, 0.0)])
def test_fused_loss_interpreted(turn: int, clipped: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in one pass, with skipped rows, and in two."""
    monkeypatch.setattr(head_launch, "SCRATCH_BYTES", 0)
    check_loss(SMALL_HEAD, HALF, clipped, turn)


@interpreted
@pytest.mark.parametrize(("width", "group", "prefix"), [(80, 7, 65), (128, 4, 0)])
def test_attention_interpreted(width: int, group: int, prefix: int) -> None:
    """The same for attention: a padded width, idle rows of a group of 7, a prefix."""
    check_attention(150, width, group, prefix, HALF)


@interpreted
@pytest.mark.parametrize("width", [128, 256])
def test_attention_with_options_interpreted(width: int) -> None:
    """The same with a window, a soft cap, for whose gradients of keys there are tiles of their own, and sinks."""
    check_attention(100, width, 2, 65, HALF, **OPTIONS)


KERNELS = (*candidates.CHANGES, *attention_candidates.CHANGES)


def check_candidate(name: str, head: tuple[int, int, int], tokens: int) -> None:
    """A kernel or tile that may become the default calculates as rightly as what it would replace."""
    if name in attention_candidates.CHANGES:
        with attention_candidates.changed(name):
            check_attention(tokens, 128, 4, 65, HALF)
        return
    with candidates.changed(name):
        check_head(head, HALF, True)
        for turn in (40, head[0]):
            check_loss(head, HALF, 0.5, turn)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", KERNELS)
def test_candidates(name: str) -> None:
    """Fails if a candidate would be recommended for being fast and wrong."""
    check_candidate(name, HEAD, ROWS[-1][0])


@interpreted
@pytest.mark.parametrize("name", ["specialised", "branch", "prefetch", "strips_64"])
def test_candidates_interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for those that are code of their own."""
    monkeypatch.setattr(head_launch, "SCRATCH_BYTES", 0)
    check_candidate(name, SMALL_HEAD, 0)
