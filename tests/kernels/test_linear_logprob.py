"""linear_logprob against its definition: values, gradients, precision, memory, edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atpo_kernels import linear_logprob
from atpo_kernels.linear_logprob import tiles
from tests.helpers.error_bounds import assert_no_less_precise, head_bounds
from tests.helpers.kernel_cases import Head, LargestOutput, random_head, upstream

# rows / vocabulary: less than, exactly and more than a chunk of 128 rows
SIZES = [(1, 1), (5, 7), (128, 40), (300, 33)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 128 rows in blocks of a few, so that small inputs have several."""
    monkeypatch.setitem(tiles._CHUNK_BYTES, "cpu", 0)
    monkeypatch.setitem(tiles._MIN_ROWS, "cpu", 128)
    monkeypatch.setitem(tiles._BLOCK_BYTES, "cpu", 4000)
    monkeypatch.setitem(tiles._TORCH_TILES, "cpu", (100, 17))


def run(
    head: Head, dtype: torch.dtype, impl: str, temperature: float = 0.7, softcap: float | None = None
) -> list[Tensor]:
    """Log-prob, entropy, and gradients of hidden, weight and bias through both; upstream gradients are not 1."""
    leaves = head.leaves(dtype)
    logprob, entropy = linear_logprob(
        leaves[0], leaves[1], head.targets, bias=leaves[2], temperature=temperature, softcap=softcap, impl=impl
    )
    up = [x.to(logprob.dtype) for x in upstream(len(head.targets))]
    grads = torch.autograd.grad((up[0] * logprob + up[1] * entropy).sum(), leaves)
    return [logprob.detach(), entropy.detach(), *grads]


@pytest.mark.parametrize(("rows", "vocab"), SIZES)
def test_float64_equals_the_definition(rows: int, vocab: int) -> None:
    """Fails on any error in the closed-form gradient, the temperature, the bias or the chunk borders."""
    head = random_head(rows, 6, vocab)
    for ours, theirs in zip(run(head, torch.float64, "torch"), run(head, torch.float64, "reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("softcap", [0.5, 3.0])  # most logits at the cap; most below
@pytest.mark.parametrize(("rows", "vocab"), SIZES)
def test_soft_caps_equal_the_definition(rows: int, vocab: int, softcap: float) -> None:
    """Fails if the cap comes after the temperature, or a gradient misses its slope, the target's above all."""
    head = random_head(rows, 6, vocab)
    ours, theirs = (run(head, torch.float64, impl, softcap=softcap) for impl in ("torch", "reference"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    with pytest.raises(ValueError, match="softcap must be positive"):
        run(head, torch.float64, "torch", softcap=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# standard deviation of the logits: random weights, a trained model, underflow of most probabilities
@pytest.mark.parametrize("peak", [1.0, 8.0, 60.0])
def test_no_less_precise_than_plain_pytorch(dtype: torch.dtype, peak: float) -> None:
    """Fails if logits or sums are rounded to half precision, or if a sum cancels where plain PyTorch does not."""
    head = random_head(300, 32, 120, peak=peak).rounded(dtype)
    exact, ours, plain = (
        run(head, d, i) for d, i in ((torch.float64, "reference"), (dtype, "torch"), (dtype, "reference"))
    )
    bounds = head_bounds(head, exact, upstream(300), dtype, temperature=0.7)
    for e, o, p, bound in zip(exact, ours, plain, bounds, strict=True):
        assert_no_less_precise(p, o, e, bound)


def test_output_dtypes() -> None:
    """Fails if half-precision inputs give half-precision log-probs, or float64 loses precision."""
    head = random_head(4, 3, 5)
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]:
        leaves = head.leaves(dtype)
        out = linear_logprob(leaves[0], leaves[1], head.targets)
        assert [x.dtype for x in out] == [expected] * 2
        assert all(g.dtype == dtype for g in torch.autograd.grad(out[0].sum(), leaves[:2]))


def test_gradcheck() -> None:
    """Fails if the analytic backward is not the derivative of the forward (torch path and reference)."""
    head = random_head(5, 3, 4)

    def outputs(*leaves: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        return linear_logprob(leaves[0], leaves[1], head.targets, bias=leaves[2], temperature=1.3, impl=impl)

    for impl in ("torch", "reference"):
        leaves = head.leaves(torch.float64)
        assert torch.autograd.gradcheck(lambda *x, impl=impl: outputs(*x, impl=impl), leaves)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 300), zero=st.floats(0, 1), seed=st.integers(0, 99))
def test_rows_without_gradient_change_nothing(rows: int, zero: float, seed: int) -> None:
    """Fails if dropping rows of zero upstream gradient misplaces the others."""
    head = random_head(rows, 4, 9, seed)
    rng = torch.Generator().manual_seed(seed)
    up = torch.randn(rows, generator=rng, dtype=torch.float64) * (torch.rand(rows, generator=rng) >= zero)
    grads = []
    for impl in ("torch", "reference"):
        leaves = head.leaves(torch.float64)
        logprob, _ = linear_logprob(leaves[0], leaves[1], head.targets, bias=leaves[2], impl=impl)
        grads.append(torch.autograd.grad((logprob * up).sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_one_output_alone_and_partial_gradients() -> None:
    """Fails if a missing upstream gradient is taken for ones, or a frozen weight gets a gradient."""
    head = random_head(6, 4, 9)
    for which in (0, 1):
        grads = []
        for impl in ("torch", "reference"):
            hidden = head.hidden.clone().requires_grad_()
            out = linear_logprob(hidden, head.weight, head.targets, bias=head.bias, impl=impl)[which]
            grads.append(torch.autograd.grad(out.sum(), hidden)[0])
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


def test_no_logits_of_all_rows() -> None:
    """Fails if any operation, forward or backward, returns a tensor of A x V elements."""
    head = random_head(1000, 4, 50)
    with LargestOutput() as largest:
        run(head, torch.float32, "torch")
    assert largest.elements <= 128 * 50


def test_no_rows_keep_the_graph() -> None:
    """Fails if an empty batch breaks: a rank without action tokens must still produce (zero) gradients."""
    leaves = random_head(3, 4, 9).leaves(torch.float32)
    logprob, entropy = linear_logprob(leaves[0][:0], leaves[1], torch.zeros(0, dtype=torch.int64), bias=leaves[2])
    (logprob.sum() + entropy.sum()).backward()
    assert logprob.shape == entropy.shape == (0,)
    assert all(x.grad is not None and not x.grad.any() for x in leaves)


def test_non_contiguous_inputs_and_int32_targets() -> None:
    """Fails if a stride is ignored."""
    head = random_head(20, 4, 9)
    plain = linear_logprob(head.hidden, head.weight, head.targets)
    strided = linear_logprob(head.hidden.T.contiguous().T, head.weight.T.contiguous().T, head.targets.int())
    torch.testing.assert_close(strided, plain)


def test_autocast_has_no_effect() -> None:
    """Fails if a trainer's autocast rounds logits or gradients to half precision, in the forward or the backward."""
    head = random_head(20, 8, 30)
    plain = run(head, torch.float32, "torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(head, torch.float32, "torch")
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_errors_say_what_is_wrong() -> None:
    """Fails if bad arguments reach the arithmetic, or a partitioned weight gives an obscure message."""
    head = random_head(4, 3, 5)
    h, w, t = head.hidden, head.weight, head.targets
    bad: list[tuple[Any, dict[str, Any], str]] = [
        ((h, w[:0], t), {}, "ZeRO-3"),
        ((h, w[:, :2], t), {}, r"\(A, D\)"),
        ((h, w, t[:3]), {}, "targets must be"),
        ((h, w.float(), t), {}, "one floating dtype"),
        ((h, w, t.double()), {}, "int64 or int32"),
        ((h, w, t + 5), {}, r"\[0, 5\)"),
        ((h, w, t), {"bias": head.bias[:2]}, "bias must be"),
        ((h, w, t), {"temperature": 0.0}, "temperature"),
        ((h, w, t), {"impl": "cuda"}, "impl='cuda'"),
    ]
    for arguments, keywords, message in bad:
        with pytest.raises(ValueError, match=message):
            linear_logprob(*arguments, **keywords)
