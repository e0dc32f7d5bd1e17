"""linear_turn_policy_loss against the two operators it fuses: values, gradients, chunk borders, memory, edges."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atpo_kernels import LeafPaths, LinearTurnLoss, LossConfig, TokenWeights, linear_logprob, linear_turn_policy_loss
from atpo_kernels.choices import ClipFamily, RatioLevel
from atpo_kernels.linear_logprob import tiles, torch_impl
from atpo_kernels.linear_turn_policy_loss.tiles import plan_chunks
from tests.helpers.error_bounds import assert_no_less_precise, head_bounds
from tests.helpers.kernel_cases import LargestOutput, loss_case, random_head, turn_offsets
from tests.helpers.turn_loss_cases import turn_clip

LEVELS, CLIPS = get_args(RatioLevel), get_args(ClipFamily)
CHUNK = 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 rows in blocks of a few, so that small inputs have several and some turns exceed a chunk."""
    monkeypatch.setitem(tiles._CHUNK_BYTES, "cpu", 0)
    monkeypatch.setitem(tiles._BLOCK_BYTES, "cpu", 300)
    monkeypatch.setitem(tiles._TORCH_TILES, "cpu", (CHUNK, 4))
    monkeypatch.setitem(tiles._MIN_ROWS, "cpu", CHUNK)


def case(lengths: list[int], seed: int) -> tuple[Any, dict[str, Any]]:
    """An LM head and the keyword arguments of a loss on packed turns; a third of the tokens has weight 0."""
    head, keywords = loss_case(lengths, seed=seed, temperature=1.0)
    del keywords["logprob"]
    return head, keywords


def run(head: Any, keywords: dict[str, Any], dtype: torch.dtype = torch.float64, **more: Any) -> list[Tensor]:
    """Every output, and the gradients under an upstream gradient other than 1: a power of 2, so it rounds nothing."""
    leaves = head.leaves(dtype)
    out = linear_turn_policy_loss(leaves[0], leaves[1], head.targets, bias=leaves[2], **keywords, **more)
    assert isinstance(out, LinearTurnLoss) and not out.logprob.requires_grad and not out.entropy.requires_grad
    grads = torch.autograd.grad(out.loss * -2.0, leaves)
    return [out.loss.detach(), out.coef, out.logprob, out.entropy, *out.metrics.values(), *grads]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Of float64 results."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 2 * CHUNK + 3), min_size=1, max_size=6),
    level=st.sampled_from(LEVELS),
    clip=st.sampled_from(CLIPS),
    extra=st.sampled_from(
        [{}, {"kl": "k3", "kl_coef": 0.2}, {"entropy_coef": 0.1}, {"importance_cap": 1.1}, {"dual_cap": 1.2}]
    ),
    seed=st.integers(0, 99),
)
def test_equals_the_definition(lengths: list[int], level: Any, clip: Any, extra: dict[str, Any], seed: int) -> None:
    """Fails if a chunk border cuts a turn, a long turn is treated as two, or a dropped row had a gradient."""
    head, keywords = case(lengths, seed)
    config = LossConfig(level=level, clip=clip, clip_low=0.1, clip_high=0.1, **extra)
    ours, definition = (run(head, keywords, temperature=0.8, config=config, impl=i) for i in ("torch", "reference"))
    assert_equal(ours, definition)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_soft_caps_equal_the_definition(level: RatioLevel, entropy_coef: float) -> None:
    """Fails if the gradient in the forward, or that of a turn longer than a chunk, misses the slope of the cap."""
    head, keywords = case([3, 0, 2 * CHUNK + 3, 1, 5], 3)
    config = LossConfig(level=level, clip_low=0.1, clip_high=0.1, entropy_coef=entropy_coef)
    more: dict[str, Any] = {"temperature": 0.8, "softcap": 1.5, "config": config}
    assert_equal(run(head, keywords, impl="torch", **more), run(head, keywords, impl="reference", **more))


@pytest.mark.parametrize("level", ["token", "turn"])
def test_clip_ranges_of_turns(level: Any) -> None:
    """Fails if a chunk takes the clip ranges of the first turns instead of its own."""
    lengths = [3, 20, 1, 6, 0, 7]
    head, keywords = case(lengths, 0)
    keywords |= turn_clip(len(lengths))
    assert_equal(*(run(head, keywords, temperature=0.8, level=level, impl=i) for i in ("torch", "reference")))


def test_advantages_by_turn_and_on_policy() -> None:
    """Fails if advantages do not reach the weights, or old_logprob=None is anything but a ratio of 1."""
    head, keywords = case([3, 20, 1, 6], 0)
    advantages = torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=torch.float64)
    offsets = keywords["turn_offsets"]
    more = {"advantages": advantages, "turn_offsets": offsets, "reduction": "turn-mean"}
    logprob, _ = linear_logprob(head.hidden, head.weight, head.targets, bias=head.bias)
    ours, definition = (run(head, {"old_logprob": o, **more}) for o in (None, logprob))
    assert_equal(ours, definition)
    assert_equal(ours, run(head, {"old_logprob": logprob, **more}, impl="reference"))
    torch.testing.assert_close(ours[0], -advantages.mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# standard deviation of the logits: random weights, a trained model, underflow of most probabilities
@pytest.mark.parametrize("peak", [1.0, 8.0, 60.0])
def test_no_less_precise_than_plain_pytorch(dtype: torch.dtype, peak: float) -> None:
    """Fails if logits, log-probs or the sum for the weight are rounded to half precision."""
    lengths = [5, 1, 30, 8, 6] * 5
    head = random_head(sum(lengths), 32, 120, peak=peak).rounded(dtype)
    advantages = torch.randn(len(lengths), generator=torch.Generator().manual_seed(1))
    more: dict[str, Any] = {"old_logprob": None, "advantages": advantages, "turn_offsets": turn_offsets(lengths)}
    exact = run(head, more, torch.float64, impl="reference")
    ours, plain = run(head, more, dtype), run(head, more, dtype, impl="reference")
    exact, ours, plain = ([*x[2:4], *x[-3:]] for x in (exact, ours, plain))  # log-prob, entropy, gradients
    coef = -advantages.double().repeat_interleave(torch.tensor(lengths))  # the ratio is 1
    up = (-2.0 * coef, torch.zeros_like(coef))
    bounds = head_bounds(head, exact, up, dtype, temperature=1.0, factor=2.0)
    for e, o, p, bound in zip(exact, ours, plain, bounds, strict=True):
        assert_no_less_precise(p, o, e, bound)


def test_no_gradient_asked_for() -> None:
    """Fails if the values depend on whether gradients are computed, or gradients are computed for nothing."""
    head, keywords = case([3, 20, 1, 6], 0)
    with_gradient = run(head, keywords)
    plain = linear_turn_policy_loss(head.hidden, head.weight, head.targets, bias=head.bias, **keywords)
    assert_equal(with_gradient[:4], [plain.loss, plain.coef, plain.logprob, plain.entropy])
    assert not plain.loss.requires_grad
    with torch.no_grad(), LargestOutput() as largest:
        leaves = head.leaves(torch.float64)
        out = linear_turn_policy_loss(leaves[0], leaves[1], head.targets, bias=leaves[2], **keywords)
    assert not out.loss.requires_grad and largest.elements <= max(CHUNK * 11, head.hidden.numel())


def test_loss_may_be_scaled_in_place() -> None:
    """Fails if the loss is a view: gradient accumulation is often written `loss /= steps`."""
    head, keywords = case([3, 6], 0)
    grads = []
    for scaled in (False, True):
        leaves = head.leaves(torch.float64)
        loss = linear_turn_policy_loss(leaves[0], leaves[1], head.targets, bias=leaves[2], **keywords).loss
        if scaled:
            loss /= 4
        grads.append(torch.autograd.grad(loss, leaves))
    assert_equal([g / 4 for g in grads[0]], list(grads[1]))


def test_autocast_has_no_effect() -> None:
    """Fails if a trainer's autocast rounds logits or gradients to half precision."""
    head, keywords = case([3, 6, 20], 0)
    plain = run(head, keywords, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(head, keywords, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_frozen_inputs_get_no_gradient() -> None:
    """Fails if one needed gradient depends on the others being needed."""
    head, keywords = case([3, 20, 1, 6], 0)
    full = run(head, keywords)[-3:]
    for i in range(3):
        inputs = [head.hidden, head.weight, head.bias]
        inputs[i] = inputs[i].clone().requires_grad_()
        out = linear_turn_policy_loss(inputs[0], inputs[1], head.targets, bias=inputs[2], **keywords)
        assert_equal([torch.autograd.grad(out.loss * -2.0, inputs[i])[0]], [full[i]])


def test_backward_twice() -> None:
    """Fails if a backward that keeps the graph scales the stored gradients in place, or one that does not is silent."""
    head, keywords = case([3, 6], 0)
    leaves = head.leaves(torch.float64)
    loss = linear_turn_policy_loss(leaves[0], leaves[1], head.targets, bias=leaves[2], **keywords).loss
    first = [g.clone() for g in torch.autograd.grad(loss * 3, leaves, retain_graph=True)]
    second = torch.autograd.grad(loss * 3, leaves, retain_graph=True)
    third = torch.autograd.grad(loss * 3, leaves)
    assert_equal(first, list(second))
    assert_equal(first, list(third))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss * 3, leaves)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_no_logits_of_all_rows(level: Any, entropy_coef: float) -> None:
    """Fails if any operation returns more than a chunk of logits; one turn is far longer than a chunk."""
    lengths = [3, 100, 5]
    head = random_head(sum(lengths), 4, 50)
    _, keywords = case(lengths, 0)
    with LargestOutput() as largest:
        run(head, keywords, torch.float32, level=level, entropy_coef=entropy_coef)
    assert largest.elements <= sum(lengths) * 6  # the hidden states and a few numbers by row; logits would be 50


def test_clipped_rows_cost_no_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if rows without gradient reach the products that form the gradients."""
    head, keywords = case([4, 4], 0)
    share = torch.ones(8, dtype=torch.float64)
    share[:4] = 0
    keywords["weights"] = TokenWeights(share, torch.zeros_like(share), share)
    keywords["old_logprob"] = None
    seen: list[int] = []
    original = torch_impl.HeadGradients.add_chunk

    def counting(self: Any, rows: Any, hidden: Tensor, *rest: Any) -> None:
        seen.append(len(hidden))
        original(self, rows, hidden, *rest)

    monkeypatch.setattr(torch_impl.HeadGradients, "add_chunk", counting)
    run(head, keywords)
    assert seen == [4]


def test_no_rows_keep_the_graph() -> None:
    """Fails if a rank without action tokens breaks or gives no gradient."""
    leaves = random_head(3, 4, 9).leaves(torch.float32)
    empty = torch.zeros(0)
    for level in LEVELS:
        paths = LeafPaths(turn_offsets([]), empty.int(), empty, empty)
        out = linear_turn_policy_loss(
            leaves[0][:0],
            leaves[1],
            empty.long(),
            empty,
            weights=TokenWeights(empty, empty, empty),
            turn_offsets=turn_offsets([]),
            paths=paths,
            level=level,
        )
        assert all(not g.any() for g in torch.autograd.grad(out.loss, leaves[:2]))


@given(lengths=st.lists(st.integers(0, 20), max_size=30), max_rows=st.integers(1, 25))
def test_chunks_hold_whole_turns(lengths: list[int], max_rows: int) -> None:
    """Fails if a row is lost or doubled, a turn is cut, or a chunk is smaller than it need be."""
    offsets = np.cumsum([0, *lengths])
    chunks = plan_chunks(offsets, max_rows, cut_turns=False)
    assert [i for c in chunks for i in range(c.rows.start, c.rows.stop)] == list(range(sum(lengths)))
    for chunk in chunks:
        assert (offsets[chunk.turns.start], offsets[chunk.turns.stop]) == (chunk.rows.start, chunk.rows.stop)
        assert chunk.fits == (chunk.rows.stop - chunk.rows.start <= max_rows)
        assert chunk.fits or chunk.turns.stop - chunk.turns.start == 1
    for chunk, following in pairwise(chunks):
        next_turn = offsets[following.turns.start + 1] - following.rows.start
        assert chunk.rows.stop - chunk.rows.start + next_turn > max_rows or next_turn == 0
    cut = plan_chunks(offsets, max_rows, cut_turns=True)
    assert sum(c.rows.stop - c.rows.start for c in cut) == sum(lengths) and all(c.fits for c in cut)


def test_errors_say_what_is_wrong() -> None:
    """Fails if a reduction without meaning is computed, or the checks of the head are skipped."""
    head, keywords = case([3, 2], 0)
    cases: list[tuple[Tensor, dict[str, Any], str]] = [
        (head.weight[:0], {}, "linear_turn_policy_loss: weight has no elements"),
        (head.weight, {"reduction": "none"}, "linear_logprob and turn_policy_loss"),
        (head.weight, {"reduction": "token-mean"}, "'sum' or 'none'"),
    ]
    for weight, more, message in cases:
        with pytest.raises(ValueError, match=message):
            linear_turn_policy_loss(head.hidden, weight, head.targets, **keywords, **more)
