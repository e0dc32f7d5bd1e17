"""linear_turn_policy_loss on Triton kernels against float64, on the GPU where there is one, else in the interpreter."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from atpo_kernels import TokenWeights, linear_turn_policy_loss
from atpo_kernels.linear_logprob import launch
from atpo_kernels.linear_logprob.tiles import Tile
from tests.helpers import interpreter  # noqa: F401  (repairs Triton's interpreter)
from tests.helpers.error_bounds import assert_no_less_precise, assert_within
from tests.helpers.interpreter import DEVICE
from tests.helpers.kernel_cases import (
    Head,
    LargestOutput,
    NoHostSync,
    loss_case,
    on_device,
    random_head,
    run_linear_loss,
    turn_offsets,
)
from tests.helpers.turn_loss_cases import linear_loss_bounds, turn_clip

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CHUNK = 16
# A turn that fits a chunk with others, one longer than two chunks, an empty one, one that fills a chunk, single tokens.
LENGTHS = [5, 40, 3, 0, 16, 1, 9, 1]
BOUNDS: dict[str, Any] = {"clip_low": 0.1, "clip_high": 0.1}
CONFIGS: dict[str, dict[str, Any]] = {
    "turn": {},
    "token": {"level": "token"},
    "sequence": {"level": "sequence"},  # every row is computed twice
    "kl": {"kl": "k3", "kl_coef": 0.2},
    "entropy": {"entropy_coef": 0.1},  # no row may be left out
    "importance": {"importance_cap": 1.1},
    "cispo": {"clip": "cispo", "dual_cap": 1.2},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one tile of 16 rows, on every device."""
    tile = Tile(CHUNK, 64, 32, num_warps=4, num_stages=2, descriptors=True, group=2)
    monkeypatch.setattr(launch, "tile_for", lambda *_: tile)
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 0)


def run(head: Head, keywords: dict[str, Any], dtype: torch.dtype, impl: str, **more: Any) -> list[Tensor]:
    """Every output, and the gradients under an upstream gradient other than 1."""
    return run_linear_loss(head, keywords, dtype, DEVICE, impl=impl, **BOUNDS, **more)


def assert_exact(head: Head, keywords: dict[str, Any], **more: Any) -> list[Tensor]:
    """Equal to float64 up to float32's rounding; returns the float64 results."""
    head = head.rounded(torch.float32)
    exact = run(head, keywords, torch.float64, "reference", **more)
    ours = run(head, keywords, torch.float32, "triton", **more)
    more.pop("bias", None)
    for o, e, bound in zip(
        ours, exact, linear_loss_bounds(head, keywords, exact, torch.float32, **BOUNDS, **more), strict=True
    ):
        assert_within(o, e, bound.worst)
    return exact


# every configuration in float32 and in one of the two half precisions, by turns
IN_TURN = [(dtype, name) for i, name in enumerate(CONFIGS) for dtype in (torch.float32, DTYPES[i % 2])]


@pytest.mark.parametrize(("dtype", "name"), IN_TURN, ids=str)
def test_as_precise_as_plain_pytorch(dtype: torch.dtype, name: str) -> None:
    """Fails if a chunk cuts a turn, a coefficient reaches the wrong row, or exponentials are rounded too early."""
    head, keywords = loss_case(LENGTHS, width=24, vocab=150, seed=1, peak=2.0)
    head = head.rounded(dtype)
    exact, ours, plain = (
        run(head, keywords, d, impl, **CONFIGS[name])
        for d, impl in ((torch.float64, "reference"), (dtype, "triton"), (dtype, "reference"))
    )
    bounds = linear_loss_bounds(head, keywords, exact, dtype, **BOUNDS, **CONFIGS[name])
    for e, o, p, bound in zip(exact, ours, plain, bounds, strict=True):
        assert_no_less_precise(p, o, e, bound)


def test_clip_ranges_of_turns_and_dual_cap() -> None:
    """Fails if a range of turns takes the clip ranges of the first, or a chunk forgets the cap."""
    head, keywords = loss_case(LENGTHS, width=16, vocab=70, seed=2)
    head, keywords = head.rounded(torch.float32), keywords | turn_clip(len(LENGTHS))
    exact, ours = (
        run_linear_loss(head, keywords, d, DEVICE, impl=impl, dual_cap=1.2)
        for d, impl in ((torch.float64, "reference"), (torch.float32, "triton"))
    )
    bounds = linear_loss_bounds(head, keywords, exact, torch.float32, dual_cap=1.2)
    for o, e, bound in zip(ours, exact, bounds, strict=True):
        assert_within(o, e, bound.worst)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("turn", [1, 7, 15, 16, 17, 50])  # shorter than, as long as, and longer than a chunk
def test_turn_lengths(turn: int, bias: bool) -> None:
    """Fails at a border of chunks: turns of one length, from one row to three chunks."""
    head, keywords = loss_case([turn] * 3, width=16, vocab=70, seed=turn)
    assert_exact(head, keywords, bias=bias)


@pytest.mark.parametrize("lengths", [[5, 3, 0, 8], [5, 3, 0, 9]])  # 16 rows fill a chunk, 17 do not fit
def test_sequences_in_one_pass_where_they_fit(lengths: list[int]) -> None:
    """Fails if trajectories that fit a chunk are computed twice, or wrongly."""
    head, keywords = loss_case(lengths, width=16, vocab=70, seed=8)
    passes = []
    dlogits = launch.TritonHead.dlogits

    def counted(self: Any, *arguments: Any) -> Tensor:
        passes.append(1)
        return dlogits(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.TritonHead, "dlogits", counted)
        assert_exact(head, keywords, level="sequence")
    assert bool(passes) == (sum(lengths) > CHUNK)


def test_on_policy_takes_the_current_log_probs() -> None:
    """Fails if the placeholder of the old log-probs is used, or the ratio is not exactly 1."""
    head, keywords = loss_case(LENGTHS, width=16, vocab=70, seed=2)
    keywords["old_logprob"] = None
    assert_exact(head, keywords)


@pytest.mark.parametrize("clipped", [0.0, 0.5, 1.0])
def test_rows_without_gradient_reach_no_product(clipped: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if clipped turns still cost matrix products, or if leaving them out moves the others' gradients."""
    lengths = [6, 4, 9, 5, 12, 3, 16, 40]
    head, keywords = loss_case(lengths, width=16, vocab=70, seed=3)
    tokens = sum(lengths)
    apart = torch.zeros(len(lengths))
    apart[: round(clipped * len(lengths))] = 1.0  # the ratio of these turns is e
    keywords["old_logprob"] = keywords["logprob"] - apart.repeat_interleave(torch.tensor(lengths))
    keywords["weights"] = TokenWeights(*torch.tensor([1.0, 0.0, 1.0])[:, None].expand(3, tokens))
    seen = []
    add = launch.Gradients.add
    monkeypatch.setattr(
        launch.Gradients, "add", lambda self, dlogits, *rest: seen.append(len(dlogits)) or add(self, dlogits, *rest)
    )
    exact = assert_exact(head, keywords)
    assert sum(seen) == int((exact[1] != 0).sum()) == tokens - sum(lengths[: round(clipped * len(lengths))])


def test_float16_gradients_do_not_underflow() -> None:
    """Fails if weights like 1e-7 are multiplied in before the loss scale arrives with the backward."""
    head, keywords = loss_case([5, 9], width=16, vocab=70, seed=4)
    head = head.rounded(torch.float16)
    keywords["weights"] = TokenWeights(
        *(1e-7 * w for w in (keywords["weights"].pos, keywords["weights"].neg, keywords["weights"].all))
    )
    ours, exact = (
        run(head, keywords, d, i, upstream=-(2.0**20))
        for d, i in ((torch.float16, "triton"), (torch.float64, "reference"))
    )
    for o, e in zip(ours[-3:], exact[-3:], strict=True):
        assert (o.double() - e).norm() <= 2e-3 * e.norm()


def test_same_bits_twice() -> None:
    """Fails if a sum depends on the order in which programs finish."""
    head, keywords = loss_case(LENGTHS, width=16, vocab=70, seed=5)
    first, second = (run(head, keywords, torch.bfloat16, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_does_not_grow_with_rows_and_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if any step allocates (A, V), or reads a number from the device (offsets are given on the host)."""
    operator = import_module("atpo_kernels.linear_turn_policy_loss")  # on the CPU, and only there, checks read tensors
    monkeypatch.setattr(operator, "check_linear", lambda *_: None)
    monkeypatch.setattr(operator, "check_arguments", lambda *_: None)
    vocab = 640
    largest = []
    for turns in (8, 16):
        head, keywords = loss_case([10] * turns, width=8, vocab=vocab, seed=6)
        with LargestOutput() as biggest, NoHostSync():
            run(head, keywords, torch.bfloat16, "triton")
        largest.append(biggest.elements)
    assert largest == [CHUNK * vocab] * 2


def test_without_gradient_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an evaluation pays for products that nobody asked for."""
    monkeypatch.setattr(launch.Gradients, "add", lambda *_: pytest.fail("a gradient was computed"))
    head, keywords = loss_case([5, 9], width=16, vocab=70, seed=7)
    keywords.pop("logprob")
    with torch.no_grad():
        out = linear_turn_policy_loss(
            head.hidden.float().to(DEVICE), head.weight.float().to(DEVICE), head.targets.to(DEVICE), impl="triton",
            **{name: on_device(value, DEVICE) for name, value in keywords.items()},
        )  # fmt: skip
    assert not out.loss.requires_grad


def test_no_tokens() -> None:
    """Fails if a rank without action tokens breaks, or leaves the weight without a (zero) gradient."""
    leaves = [x.to(DEVICE).detach().requires_grad_() for x in random_head(3, 8, 9).leaves(torch.bfloat16)]
    none = torch.zeros(0, device=DEVICE)
    out = linear_turn_policy_loss(
        leaves[0][:0], leaves[1], none.long(), none, bias=leaves[2], turn_offsets=turn_offsets([]),
        weights=TokenWeights(none, none, none), impl="triton",
    )  # fmt: skip
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert all(x.grad is not None and not x.grad.any() for x in leaves)
