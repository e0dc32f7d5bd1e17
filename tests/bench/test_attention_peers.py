"""Implementations that tree_attention is compared with compute the same: sdpa, FlexAttention, xformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atpo_kernels import tree_attention
from bench.attention.flex import make_flex_mask, tree_attention_flex
from bench.attention.sdpa import tree_attention_sdpa
from bench.attention.xformers import sequence_lengths, tree_attention_xformers
from tests.helpers.tree_cases import inputs, random_row, row_of, seen_pairs, tree_mask


@pytest.mark.parametrize("prefix", [0, 1, 65])
@pytest.mark.parametrize("tokens", [0, 1, 63, 300])
def test_sdpa_equals_the_definition(tokens: int, prefix: int) -> None:
    """Fails if a query sees a key that it should not, heads are grouped otherwise, or a gradient lies elsewhere."""
    end = random_row(tokens, 40, tokens) if tokens else torch.zeros(0, dtype=torch.int32)
    q, k, v, upstream = inputs(tokens, (4, 2), 8, prefix=prefix)
    for a, b in zip(
        *(
            [out, *torch.autograd.grad(out, (q, k, v), upstream)]
            for out in (tree_attention_sdpa(q, k, v, end, scale=0.3), tree_attention(q, k, v, end, scale=0.3))
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 1, 128, 300])
@pytest.mark.parametrize(("tokens", "turn"), [(100, 30), (128, 200), (300, 40), (700, 60)])
def test_flex_mask_equals_the_mask(tokens: int, turn: int, prefix: int) -> None:
    """Fails if the BlockMask misses or adds a block, or evaluates no mask in a partial one."""
    end = random_row(tokens, turn, 3)
    mask = make_flex_mask(end, prefix)
    seen = seen_pairs(end, prefix, 128, 128)
    np.testing.assert_array_equal(mask.to_dense()[0, 0].numpy(), seen > 0)
    assert mask.full_kv_num_blocks is not None
    counts = [x[0, 0].tolist() for x in (mask.kv_num_blocks, mask.full_kv_num_blocks)]
    full = seen == np.minimum(128, tokens - np.arange(0, tokens, 128))[:, None] * 128
    assert counts == [((seen > 0) & ~full).sum(1).tolist(), full.sum(1).tolist()]
    query, key = torch.arange(tokens), torch.arange(prefix + tokens)
    any_of = torch.zeros(())  # batch and head: all are alike
    assert torch.equal(mask.mask_mod(any_of, any_of, query[:, None], key[None]), tree_mask(end, prefix))


@pytest.mark.parametrize("prefix", [0, 65])
def test_flex_equals_the_definition(prefix: int) -> None:
    """Fails if heads are grouped otherwise, the scale is lost, or given blocks are not used."""
    end = random_row(300, 40, 3)
    q, k, v, _ = (x.detach() for x in inputs(300, (4, 2), 16, torch.float32, prefix=prefix))
    expected = tree_attention(q, k, v, end, scale=0.3, impl="reference")
    blocks = make_flex_mask(end, prefix)
    for given in (None, blocks):
        out = tree_attention_flex(q, k, v, end, scale=0.3, blocks=given)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    longer = [torch.cat([x[:1], x]) for x in (k, v)]
    for tokens, keys in ((200, (k, v)), (300, longer)):  # another row, another prefix
        with pytest.raises(ValueError, match="make_flex_mask"):
            tree_attention_flex(q[:tokens], keys[0], keys[1], random_row(tokens, 40, 3), blocks=blocks)


def test_xformers_takes_flat_rows_on_a_gpu() -> None:
    """Fails if a branch is computed as if it were a sequence, or a missing package is a bare ImportError."""
    assert sequence_lengths(row_of([3, 1, 4], [0, 0, 0])) == [3, 1, 4]
    assert sequence_lengths(row_of([3, 2, 4], [0, 1, 0])) == [5, 4]  # one child is no branch
    branching = row_of([3, 2, 4], [0, 1, 1])
    q, k, v, _ = (x.detach() for x in inputs(9, (2, 1), 16, torch.float32))
    with pytest.raises(ValueError, match="flat rows only"):
        tree_attention_xformers(q, k, v, branching)
    with pytest.raises(ValueError, match="without a prefix, here 2 tokens"):
        tree_attention_xformers(q[2:], k, v, row_of([7], [0]))
    with pytest.raises(RuntimeError, match=r"needs (the package xformers|CUDA tensors)"):
        tree_attention_xformers(q, k, v, row_of([9], [0]))
