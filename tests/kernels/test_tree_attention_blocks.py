"""Block lists of tree_attention against the mask that they list."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atpo_kernels import tree_attention
from atpo_kernels.tree_attention import BlockSizes, TreeBlockLists, make_attention_blocks
from atpo_kernels.tree_attention import make_tree_block_lists as make_lists
from tests.helpers.tree_cases import inputs, random_row, row_of, seen_pairs, tree_mask


def listed(offsets: Tensor, blocks: Tensor, columns: int) -> np.ndarray:
    """(query blocks, key blocks) how often each pair is listed."""
    count = np.zeros((len(offsets) - 1, columns), dtype=int)
    for i, row in enumerate(count):
        np.add.at(row, blocks[offsets[i] : offsets[i + 1]].numpy(), 1)
    return count


def check_query_lists(lists: TreeBlockLists, end: Tensor) -> None:
    """Full and partial key blocks of every query block, and the order of work."""
    queries, keys = lists.sizes.queries, lists.sizes.keys
    seen = seen_pairs(end, lists.prefix, queries, keys, lists.window)
    present = np.minimum(queries, len(end) - np.arange(0, len(end), queries))[:, None]
    full = seen == present * keys  # a short last block of keys is never full
    np.testing.assert_array_equal(listed(lists.full_offsets, lists.full, seen.shape[1]), full)
    np.testing.assert_array_equal(listed(lists.partial_offsets, lists.partial, seen.shape[1]), (seen > 0) & ~full)
    work = (seen > 0).sum(1)[lists.query_order.numpy()]
    assert (np.diff(work) <= 0).all() and sorted(lists.query_order.tolist()) == list(range(len(seen)))


def check_key_parts(lists: TreeBlockLists, end: Tensor, workers: int) -> None:
    """Full and partial query blocks of every key block, each in one piece, none of which is a long tail."""
    queries, keys = lists.sizes.queries_by_key, lists.sizes.keys_by_key
    seen = seen_pairs(end, lists.prefix, queries, keys, lists.window)
    full, partial = np.zeros_like(seen), np.zeros_like(seen)
    listed_blocks = np.arange(len(seen)) if lists.query_blocks is None else lists.query_blocks.numpy()
    slots, written = [], []
    for block, lo, full_lo, full_hi, hi, slot in lists.key_parts.tolist():
        assert lo <= full_lo <= full_hi <= hi
        np.add.at(partial[:, block], listed_blocks[[*range(lo, full_lo), *range(full_hi, hi)]], 1)
        np.add.at(full[:, block], listed_blocks[full_lo:full_hi], 1)
        slots += [(block, slot)] if slot >= 0 else []
        written.append(block)
    assert sorted(set(written)) == list(range(seen.shape[1]))  # also blocks that no query sees: their gradient is 0
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
@pytest.mark.parametrize("windowed", [False, True], ids=["full", "windows"])
def test_lists_equal_the_mask(turn: int, prefix: int, windowed: bool) -> None:
    """Fails if a block is missing, listed twice, not visible at all, or full though a query does not see a key."""
    rng = np.random.default_rng(turn)
    for seed in range(20 if prefix == 0 else 8):
        end = random_row(int(rng.integers(1, 300)), turn, seed)
        sizes = BlockSizes(*(int(x) for x in rng.choice([1, 3, 4, 7, 16, 18, 32], 4)))
        workers = int(rng.choice([1, 4, 1000]))
        window = int(rng.choice([1, 2, 5, 16, 33, 90, 1000])) if windowed else None
        lists = make_lists(end, sizes, key_heads=int(rng.integers(1, 4)), workers=workers, prefix=prefix, window=window)
        check_query_lists(lists, end)
        check_key_parts(lists, end, workers)


@pytest.mark.parametrize("prefix", [0, 7])
def test_first_keys_are_those_of_the_mask(prefix: int) -> None:
    """Fails if a window is counted along the row instead of the path, or the prefix is left out."""
    for seed, window in enumerate([1, 3, 10, 500]):
        end = random_row(80, 9, seed)
        lists = make_lists(end, BlockSizes(4, 4, 4, 4), prefix=prefix, window=window)
        assert lists.first_keys is not None
        np.testing.assert_array_equal(lists.first_keys + prefix, tree_mask(end, prefix, window).int().argmax(1))


@pytest.mark.parametrize("prefix", [0, 15, 16, 17])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64])
def test_lists_of_one_turn(tokens: int, prefix: int) -> None:
    """Fails if a border of blocks that is also the border of the row is taken for one more block."""
    end = torch.full((tokens,), tokens, dtype=torch.int32)
    lists = make_lists(end, BlockSizes(16, 16, 16, 16), prefix=prefix)
    check_query_lists(lists, end)
    check_key_parts(lists, end, 132)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("prefix", [0, 20])
def test_no_tokens(prefix: int, window: int | None) -> None:
    """Fails if a row without tokens breaks: a rank may have none."""
    none = torch.zeros(0, dtype=torch.int32)
    lists = make_lists(none, BlockSizes(16, 16, 16, 16), prefix=prefix, window=window).to("cpu")
    assert lists.tokens == 0 and lists.slots == 0 and len(lists.query_order) == len(lists.key_parts) == 0


def test_lists_move_as_they_are_and_stay_aligned() -> None:
    """Fails if the copy to a device mixes lists up, or starts one where a kernel would have to be compiled again."""
    lists = make_lists(random_row(200, 20, 0), BlockSizes(7, 16, 16, 18), workers=1000, window=30)
    moved = lists.to("cpu")
    names = ("query_order", "full_offsets", "full", "partial_offsets", "partial", "key_parts", "split_keys")
    for name in (*names, "query_blocks", "first_keys"):
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


@pytest.mark.parametrize("prefix", [0, 40])
def test_blocks_for_every_implementation(prefix: int) -> None:
    """Fails if make_attention_blocks gives blocks that the implementation does not take."""
    end = random_row(90, 20, 1)
    q, k, v, _ = (x.detach() for x in inputs(90, (2, 1), 16, torch.float32, prefix=prefix))
    expected = tree_attention(q, k, v, end, impl="reference")
    shape: dict[str, Any] = {"query_heads": 2, "key_heads": 1, "head_dim": 16, "dtype": q.dtype}
    for impl in ("auto", "torch", "reference"):
        blocks = make_attention_blocks(end, **shape, impl=impl, prefix=prefix)
        assert (blocks is None) == (impl == "reference")
        out = tree_attention(q, k, v, end, impl=impl, blocks=blocks)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="prefix must be"):
        make_attention_blocks(end, **shape, prefix=-1)
