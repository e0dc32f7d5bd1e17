"""Block lists of tree_attention against the mask they stand for, and FlexAttention and xformers on top of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from atpo_kernels import tree_attention
from atpo_kernels.tree_attention import BlockSizes, TreeBlockLists, make_attention_blocks, make_flex_mask
from atpo_kernels.tree_attention import make_tree_block_lists as make_lists
from atpo_kernels.tree_attention.flat import sequence_lengths
from tests.helpers.tree_cases import inputs, random_row, row_of, tree_mask


def seen_pairs(end: Tensor, prefix: int, queries: int, keys: int) -> np.ndarray:
    """(query blocks, key blocks) number of visible pairs in each."""
    mask = tree_mask(end, prefix).numpy().astype(int)
    by_query = np.add.reduceat(mask, np.arange(0, mask.shape[0], queries), 0)
    return np.add.reduceat(by_query, np.arange(0, mask.shape[1], keys), 1)


def listed(offsets: Tensor, blocks: Tensor, columns: int) -> np.ndarray:
    """(query blocks, key blocks) how often each pair is listed."""
    count = np.zeros((len(offsets) - 1, columns), dtype=int)
    for i, row in enumerate(count):
        np.add.at(row, blocks[offsets[i] : offsets[i + 1]].numpy(), 1)
    return count


def check_query_lists(lists: TreeBlockLists, end: Tensor) -> None:
    """Full and partial key blocks of every query block, and the order of work."""
    queries, keys = lists.sizes.queries, lists.sizes.keys
    seen = seen_pairs(end, lists.prefix, queries, keys)
    present = np.minimum(queries, len(end) - np.arange(0, len(end), queries))[:, None]
    full = seen == present * keys  # a short last block of keys is never full
    np.testing.assert_array_equal(listed(lists.full_offsets, lists.full, seen.shape[1]), full)
    np.testing.assert_array_equal(listed(lists.partial_offsets, lists.partial, seen.shape[1]), (seen > 0) & ~full)
    work = (seen > 0).sum(1)[lists.query_order.numpy()]
    assert (np.diff(work) <= 0).all() and sorted(lists.query_order.tolist()) == list(range(len(seen)))


def check_key_parts(lists: TreeBlockLists, end: Tensor, workers: int) -> None:
    """Full and partial query blocks of every key block, each in one piece, none of which is a long tail."""
    queries, keys = lists.sizes.queries_by_key, lists.sizes.keys_by_key
    seen = seen_pairs(end, lists.prefix, queries, keys)
    full, partial = np.zeros_like(seen), np.zeros_like(seen)
    slots = []
    for block, lo, full_lo, full_hi, hi, slot in lists.key_parts.tolist():
        assert lo <= full_lo <= full_hi <= hi and lo < hi
        partial[lo:full_lo, block] += 1
        full[full_lo:full_hi, block] += 1
        partial[full_hi:hi, block] += 1
        slots += [(block, slot)] if slot >= 0 else []
    is_full = seen == queries * keys  # a short last block of queries is never full here
    np.testing.assert_array_equal(full, is_full)
    np.testing.assert_array_equal(partial, (seen > 0) & ~is_full)
    assert sorted(slots) == [(b, s) for b, first, last in lists.split_keys.tolist() for s in range(first, last)]
    assert sorted(s for _, s in slots) == list(range(lists.slots))
    sizes = (lists.key_parts[:, 4] - lists.key_parts[:, 1]).tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= max(1, -(-sum(sizes) * lists.key_heads // (2 * workers)))


@pytest.mark.parametrize("prefix", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("turn", [1, 4, 20, 100])
def test_lists_equal_the_mask(turn: int, prefix: int) -> None:
    """Fails if a block is missing, listed twice, not visible at all, or full though a query does not see a key."""
    rng = np.random.default_rng(turn)
    for seed in range(40 if prefix == 0 else 15):
        end = random_row(int(rng.integers(1, 300)), turn, seed)
        sizes = BlockSizes(*(int(x) for x in rng.choice([1, 3, 4, 7, 16, 18, 32], 4)))
        workers = int(rng.choice([1, 4, 1000]))
        lists = make_lists(end, sizes, key_heads=int(rng.integers(1, 4)), workers=workers, prefix=prefix)
        check_query_lists(lists, end)
        check_key_parts(lists, end, workers)


@pytest.mark.parametrize("prefix", [0, 15, 16, 17])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64])
def test_lists_of_one_turn(tokens: int, prefix: int) -> None:
    """Fails if a border of blocks that is also the border of the row is taken for one more block."""
    end = torch.full((tokens,), tokens, dtype=torch.int32)
    lists = make_lists(end, BlockSizes(16, 16, 16, 16), prefix=prefix)
    check_query_lists(lists, end)
    check_key_parts(lists, end, 132)


@pytest.mark.parametrize("prefix", [0, 20])
def test_no_tokens(prefix: int) -> None:
    """Fails if a row without tokens breaks: a rank may have none."""
    lists = make_lists(torch.zeros(0, dtype=torch.int32), BlockSizes(16, 16, 16, 16), prefix=prefix).to("cpu")
    assert lists.tokens == 0 and lists.slots == 0 and len(lists.query_order) == len(lists.key_parts) == 0


def test_lists_move_as_they_are_and_stay_aligned() -> None:
    """Fails if the copy to a device mixes lists up, or starts one where a kernel would have to be compiled again."""
    lists = make_lists(random_row(200, 20, 0), BlockSizes(7, 16, 16, 18), workers=1000)
    moved = lists.to("cpu")
    for name in ("query_order", "full_offsets", "full", "partial_offsets", "partial", "key_parts", "split_keys"):
        assert torch.equal(getattr(moved, name), getattr(lists, name))
        assert getattr(moved, name).data_ptr() % 16 == 0


def test_rows_that_are_not_in_pre_order_are_refused() -> None:
    """Fails if an impossible subtree_end gives some lists or other."""
    sizes = BlockSizes(4, 4, 4, 4)
    for end in ([0, 2], [3, 3], [3, 2, 4, 4], [2, 3, 3]):
        with pytest.raises(ValueError, match="subtree"):
            make_lists(torch.tensor(end, dtype=torch.int32), sizes)


def test_the_root_of_a_wide_tree_is_cut_in_pieces() -> None:
    """Fails if the keys that all queries see are the work of one program: the last to finish, by far."""
    end = row_of([128] * 61, [0, *([1] * 60)])
    lists = make_lists(end, BlockSizes(32, 64, 64, 128), key_heads=2, workers=132)
    assert lists.split_keys[:, 0].tolist() == [0]
    assert int((lists.key_parts[:, 4] - lists.key_parts[:, 1]).max()) <= 2


@pytest.mark.parametrize("prefix", [0, 1, 128, 300])
@pytest.mark.parametrize(("tokens", "turn"), [(100, 30), (128, 200), (300, 40), (700, 60)])
def test_flex_mask_equals_the_mask(tokens: int, turn: int, prefix: int) -> None:
    """Fails if the BlockMask misses or adds a block, or evaluates no mask in a partial one."""
    end = random_row(tokens, turn, 3)
    mask = make_flex_mask(end, prefix)
    seen = seen_pairs(end, prefix, 128, 128)
    np.testing.assert_array_equal(mask.to_dense()[0, 0].numpy(), seen > 0)
    counts = [x[0, 0].tolist() for x in (mask.kv_num_blocks, mask.full_kv_num_blocks)]
    full = seen == np.minimum(128, tokens - np.arange(0, tokens, 128))[:, None] * 128
    assert counts == [((seen > 0) & ~full).sum(1).tolist(), full.sum(1).tolist()]
    query, key = torch.arange(tokens), torch.arange(prefix + tokens)
    assert torch.equal(mask.mask_mod(None, None, query[:, None], key[None]), tree_mask(end, prefix))


@pytest.mark.parametrize("prefix", [0, 65])
def test_flex_equals_the_definition(prefix: int) -> None:
    """Fails if heads are grouped otherwise, the scale is lost, or given blocks are not used."""
    end = random_row(300, 40, 3)
    q, k, v, _ = (x.detach() for x in inputs(300, (4, 2), 16, torch.float32, prefix=prefix))
    expected = tree_attention(q, k, v, end, scale=0.3, impl="reference")
    blocks = make_attention_blocks(
        end, query_heads=4, key_heads=2, head_dim=16, dtype=torch.float32, device="cpu", impl="flex", prefix=prefix
    )
    for given in (None, blocks):
        out = tree_attention(q, k, v, end, scale=0.3, impl="flex", blocks=given)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    longer = [torch.cat([x[:1], x]) for x in (k, v)]
    for tokens, keys in ((200, (k, v)), (300, longer)):  # another row, another prefix
        with pytest.raises(ValueError, match="make_flex_mask"):
            tree_attention(q[:tokens], *keys, random_row(tokens, 40, 3), impl="flex", blocks=blocks)


def test_xformers_takes_flat_rows_on_a_gpu() -> None:
    """Fails if a branch is computed as if it were a sequence, or a missing package is a bare ImportError."""
    assert sequence_lengths(row_of([3, 1, 4], [0, 0, 0])) == [3, 1, 4]
    assert sequence_lengths(row_of([3, 2, 4], [0, 1, 0])) == [5, 4]  # one child is no branch
    branching = row_of([3, 2, 4], [0, 1, 1])
    tensors = [x.detach() for x in inputs(9, (2, 1), 16, torch.float32)[:3]]
    with pytest.raises(ValueError, match="flat rows only"):
        tree_attention(*tensors, branching, impl="xformers")
    with pytest.raises(ValueError, match="without a prefix, here 2 tokens"):
        tree_attention(tensors[0][2:], *tensors[1:], row_of([7], [0]), impl="xformers")
    with pytest.raises(RuntimeError, match=r"needs (the package xformers|CUDA tensors)"):
        tree_attention(*tensors, row_of([9], [0]), impl="xformers")


@pytest.mark.parametrize("prefix", [0, 40])
def test_blocks_for_every_implementation(prefix: int) -> None:
    """Fails if make_attention_blocks gives blocks that the implementation does not take."""
    end = random_row(90, 20, 1)
    q, k, v, _ = (x.detach() for x in inputs(90, (2, 1), 16, torch.float32, prefix=prefix))
    expected = tree_attention(q, k, v, end, impl="reference")
    shape = {"query_heads": 2, "key_heads": 1, "head_dim": 16, "dtype": q.dtype}
    for impl in ("auto", "torch", "sdpa", "reference", "flex"):
        blocks = make_attention_blocks(end, **shape, impl=impl, prefix=prefix)
        assert (blocks is None) == (impl in ("sdpa", "reference"))
        out = tree_attention(q, k, v, end, impl=impl, blocks=blocks)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="prefix must be"):
        make_attention_blocks(end, **shape, prefix=-1)
