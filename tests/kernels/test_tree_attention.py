"""tree_attention against its definition, and against separate forwards of every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from atpo_kernels import make_tree_blocks, tree_attention
from tests.helpers.error_bounds import assert_no_less_precise, attention_bounds
from tests.helpers.kernel_cases import LargestOutput
from tests.helpers.tree_cases import behind_root, forward_backward, inputs, random_row, tree_mask


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(1, 150),
    turn=st.integers(1, 60),
    max_queries=st.sampled_from([1, 5, 64]),  # blocks inside turns, over a few turns, over trees
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    prefix=st.sampled_from([0, 0, 1, 30]),
    seed=st.integers(0, 999),
)
def test_blocks_equal_the_definition(
    tokens: int, turn: int, max_queries: int, heads: tuple[int, int], prefix: int, seed: int
) -> None:
    """Fails if a block misses a visible key, shows a hidden one, or adds a gradient to the wrong rows."""
    end, tensors = random_row(tokens, turn, seed), inputs(tokens, heads, 4, prefix=prefix)
    ours = forward_backward(tensors, end, blocks=make_tree_blocks(end, max_queries, prefix))
    definition = forward_backward(tensors, end, impl="reference")
    for a, b in zip(ours, definition, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 120),
    turn=st.integers(1, 40),
    max_queries=st.sampled_from([1, 5, 64]),
    prefix=st.sampled_from([0, 0, 1, 30]),
    window=st.sampled_from([1, 2, 7, 20, 31, 500]),
    sinks=st.booleans(),
    softcap=st.sampled_from([None, 1.5]),
    seed=st.integers(0, 999),
)
def test_windows_sinks_and_soft_caps_equal_the_definition(
    tokens: int, turn: int, max_queries: int, prefix: int, window: int, sinks: bool, softcap: float | None, seed: int
) -> None:
    """Fails if a window counts places in the row instead of the path, a block that it reaches is dropped, or a
    gradient misses the sinks' share or the slope of the cap."""
    end, tensors = random_row(tokens, turn, seed), inputs(tokens, (4, 2), 4, prefix=prefix)
    logits = torch.linspace(-2, 3, 4, dtype=torch.float64).requires_grad_() if sinks else None
    options: dict[str, Any] = {"window": window, "sinks": logits, "softcap": softcap}
    blocks = make_tree_blocks(end, max_queries, prefix, window)
    ours = forward_backward(tensors, end, blocks=blocks, **options)
    for a, b in zip(ours, forward_backward(tensors, end, impl="reference", **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_window_follows_the_path(impl: str) -> None:
    """Fails if the definition itself counts what lies between in the row: siblings, other trees."""
    end = torch.tensor([13] * 3 + [11] * 3 + [8] * 2 + [11] * 3 + [13] * 2 + [16] * 3, dtype=torch.int32)
    paths = [[*range(8)], [*range(6), 8, 9, 10], [0, 1, 2, 11, 12], [13, 14, 15]]
    q, k, v, _ = inputs(16, (4, 2), 8)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    out = tree_attention(q, k, v, end, impl=impl, window=4, sinks=sinks, softcap=2.0)
    for path in paths:
        scores = torch.einsum("qhd,khd->hqk", q[path], k[path].repeat_interleave(2, 1)) / 8**0.5
        place = torch.arange(len(path))
        near = (place[:, None] >= place) & (place[:, None] - place < 4)
        weights = (2 * (scores / 2).tanh()).exp() * near
        weights = weights / (weights.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
        expected = torch.einsum("hqk,khd->qhd", weights, v[path].repeat_interleave(2, 1))
        torch.testing.assert_close(out[path], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_equals_each_path_alone(impl: str) -> None:
    """Fails if a token sees a sibling's branch or another tree, or misses its own path."""
    # prompt 0-2; turn 3-5 with children 6-7 and 8-10; turn 11-12; a second tree 13-15
    end = torch.tensor([13] * 3 + [11] * 3 + [8] * 2 + [11] * 3 + [13] * 2 + [16] * 3, dtype=torch.int32)
    paths = [[*range(8)], [*range(6), 8, 9, 10], [0, 1, 2, 11, 12], [13, 14, 15]]
    q, k, v, _ = inputs(16, (4, 2), 8)
    out = tree_attention(q, k, v, end, impl=impl, scale=0.3)
    for path in paths:
        alone = [x[path].transpose(0, 1)[None] for x in (q, k, v)]
        expected = F.scaled_dot_product_attention(
            alone[0], alone[1], alone[2], is_causal=True, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(out[path], expected[0].transpose(0, 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("tokens", [1, 63, 65, 300])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_row_behind_a_prefix_equals_the_tail_of_the_whole_row(impl: str, tokens: int, prefix: int) -> None:
    """Fails if a query does not see all of the prefix, or gradients of the prefix or of the row lie elsewhere."""
    end = random_row(tokens, 40, tokens)
    q, k, v, upstream = inputs(prefix + tokens, (4, 2), 8)
    upstream[:prefix] = 0  # only the row's own outputs count
    whole = forward_backward([q, k, v, upstream], behind_root(end, prefix), impl="reference")
    ours = forward_backward([q[prefix:], k, v, upstream[prefix:]], end, impl=impl)
    for a, b in zip(ours, (whole[0][prefix:], whole[1][prefix:], *whole[2:]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# scale of the queries: flat attention, and attention to one key, where most weights underflow
@pytest.mark.parametrize("sharpness", [1.0, 60.0])
def test_no_less_precise_than_plain_pytorch(dtype: torch.dtype, sharpness: float) -> None:
    """Fails if scores, weights or sums are kept in half precision."""
    end, rounded = random_row(200, 20, 1), inputs(200, (4, 2), 16, dtype)
    rounded[0] = (rounded[0].detach() * sharpness).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in rounded]
    truth = forward_backward(exact, end, impl="reference")
    ours, plain = forward_backward(rounded, end), forward_backward(rounded, end, impl="reference")
    bounds = attention_bounds(exact, tree_mask(end), 0.25, truth, dtype)
    for t, o, p, bound in zip(truth, ours, plain, bounds, strict=True):
        assert o.dtype == dtype
        assert_no_less_precise(p, o, t, bound)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("options", [{}, {"window": 4, "softcap": 1.5}], ids=["full", "window, cap, sinks"])
def test_gradcheck(impl: str, prefix: int, options: dict[str, Any]) -> None:
    """Fails if the backward is not the derivative of the forward."""
    end = random_row(9, 3, 2)
    tensors = inputs(9, (2, 1), 2, prefix=prefix)[:3]
    if options:
        tensors.append(torch.tensor([0.3, -0.5], dtype=torch.float64).requires_grad_())

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return tree_attention(q, k, v, end, impl=impl, sinks=sinks, **options)

    assert torch.autograd.gradcheck(attend, tensors)


def test_work_follows_the_visible_pairs() -> None:
    """Fails if blocks compute much more than is visible, or anything of the size of the (T, T) mask is made."""
    trees = [random_row(500, 60, seed) for seed in range(8)]
    end = torch.cat([tree + 500 * i for i, tree in enumerate(trees)]).int()
    visible = int(tree_mask(end).sum())
    blocks = make_tree_blocks(end)
    assert visible <= blocks.pairs < 3 * visible  # the dense mask has 16,000,000 pairs
    with LargestOutput() as largest:
        forward_backward(inputs(4000, (1, 1), 8), end, blocks=blocks)
    assert largest.elements < 4000 * 100


@pytest.mark.parametrize("window", [None, 1, 20, 70])
@pytest.mark.parametrize("prefix", [0, 64])
def test_block_keys_are_ranges_of_the_mask(prefix: int, window: int | None) -> None:
    """Fails if `full` holds a key that some query of the block does not see, the own range is not last, or keys are
    listed that no query of the block sees."""
    end = random_row(300, 25, 5)
    mask, blocks = tree_mask(end, prefix, window), make_tree_blocks(end, 32, prefix, window)
    for i, (start, stop) in enumerate(zip(blocks.starts[:-1], blocks.starts[1:], strict=True)):
        assert all(bool(mask[start:stop, lo:hi].all()) for lo, hi in blocks.full[i])
        assert all(bool(mask[start:stop, lo:hi].any(0).all()) for lo, hi in blocks.partial[i][:-1])
        assert blocks.partial[i][-1] == (prefix + start, prefix + stop)


def test_non_contiguous_inputs_and_no_tokens() -> None:
    """Fails if a stride is ignored or an empty row breaks."""
    end, (q, k, v, _) = random_row(40, 6, 3), inputs(40, (4, 2), 8)
    strided = [x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (q, k, v)]
    torch.testing.assert_close(tree_attention(strided[0], strided[1], strided[2], end), tree_attention(q, k, v, end))
    for impl in ("auto", "reference"):
        for prefix in (0, 5):
            q, k, v, _ = inputs(0, (4, 2), 8, prefix=prefix)
            tree_attention(q, k, v, end[:0], impl=impl).sum().backward()
            assert all(x.grad is not None and x.grad.shape == x.shape and not x.grad.any() for x in (q, k, v))


def test_errors_say_what_is_wrong() -> None:
    """Fails if inputs that do not fit reach the arithmetic."""
    end, (q, k, v, _) = random_row(10, 3, 0), inputs(10, (4, 2), 4)
    three = q[:, :3]
    other = make_tree_blocks(random_row(9, 3, 0))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ((q, k[:5], v, end), {}, "q must be"),
        ((q, k[:5], v[:5], end), {}, "every token of q"),
        ((three, k, v, end), {}, "multiple of the key heads"),
        ((q, k, v, end[:5]), {}, "subtree_end must be"),
        ((q, k, v, end.float()), {}, "subtree_end must be"),
        ((q.float(), k, v, end), {}, "one dtype"),
        ((q, k, v, end), {"blocks": other}, "row of 9 tokens"),
        ((q[4:], k, v, random_row(6, 3, 0)), {"blocks": make_tree_blocks(random_row(6, 3, 0))}, "have 4 more"),
        ((q, k, v, end), {"blocks": make_tree_blocks(end, prefix=2)}, "behind a prefix of 2"),
        ((q, k, v, end), {"blocks": make_tree_blocks(end, window=2)}, "blocks are for window=2, but here window=None"),
        ((q, k, v, end), {"window": 0}, "window must be at least 1"),
        ((q, k, v, end), {"softcap": 0.0}, "softcap must be positive"),
        ((q, k, v, end), {"sinks": q[0, :3, 0]}, "sinks must be \\(4,\\)"),
        ((q, k, v, torch.zeros_like(end)), {}, "subtree_end\\[k\\] must lie"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            tree_attention(*arguments, **options)
