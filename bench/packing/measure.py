"""Measure the host's preparation; the GPU of a machine that has one is not used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from atpo_fast import TurnTree
from atpo_fast.packing import PackedTrees
from atpo_kernels.tree_attention import make_tree_block_lists
from atpo_kernels.tree_attention.tiles import block_sizes, tiles_for
from bench.core.measure import Calls, Makers, clock, side_by_side
from bench.core.records import commit
from bench.packing.cases import GROUP, KEY_HEADS, MAX_TOKENS, TARGET, TREES, VOCAB, WIDTH, HostCase
from bench.packing.forests import SEARCH_3000, random_forest
from bench.packing.rows import tree_rows


@dataclass(frozen=True)
class Preparation:
    """A forest, its rows, and the steps that make its rows and their block lists."""

    forest: list[TurnTree]
    rows: list[PackedTrees]
    sizes: Any  # sizes of the attention's blocks

    @classmethod
    def make(cls) -> Preparation:
        """Draw the forest of the published setting and pack it."""
        forest = random_forest(TREES, SEARCH_3000, VOCAB)
        sizes = block_sizes(tiles_for(TARGET, torch.bfloat16, WIDTH), GROUP)
        return cls(forest, tree_rows(forest, MAX_TOKENS), sizes)

    def pack(self) -> list[PackedTrees]:
        """Pack the forest into rows."""
        return tree_rows(self.forest, MAX_TOKENS)

    def list_blocks(self, rows: list[PackedTrees]) -> None:
        """Build the block lists of rows."""
        for row in rows:
            make_tree_block_lists(row.subtree_end, self.sizes, key_heads=KEY_HEADS)

    def steps(self) -> Calls:
        """Return both steps together, and each by itself."""
        return {
            "ours": lambda: self.list_blocks(self.pack()),
            "packing": self.pack,
            "block lists": lambda: self.list_blocks(self.rows),
        }


def makers(case: HostCase, device: str) -> Makers:
    """Return what makes the calls: both steps together, and each by itself."""
    return _makers(Preparation.make())


def _makers(preparation: Preparation) -> Makers:
    def maker(call: Callable[[], Any]) -> Callable[[], Callable[[], Any]]:
        return lambda: call

    return {name: maker(call) for name, call in preparation.steps().items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the `with` block on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure(case: HostCase, device: str, seconds: float) -> dict[str, Any]:
    """Run the case and return the fields of its record."""

    def first(_: str, call: Callable[[], Any]) -> dict[str, Any]:
        call()
        return {}

    def about(_: str) -> dict[str, Any]:
        return {"note": "", "same_work": True, "version": commit()}

    with one_thread():
        preparation = Preparation.make()
        entries, _, _ = side_by_side(_makers(preparation), first, about, "cpu", seconds)
        read = clock("cpu")
    forest = preparation.forest
    return {
        "clock": read,
        "tokens": {"unique": sum(t.unique_tokens for t in forest), "flat": sum(t.flat_tokens for t in forest)},
        "rows": len(preparation.rows),
        "parts_ms": {name: entry["ms"] for name, entry in entries.items() if name != "ours"},
        "implementations": {"ours": entries["ours"]},
    }
