"""What the host does before a batch's first forward: packing, and the attention's block lists of every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import package_path  # noqa: F401
import torch
from case import Case
from measure import clock, interleaved, timing
from records import commit

TREES, MAX_TOKENS = 64, 65536
_TARGET, _GROUP, _KEY_HEADS, _WIDTH = "sm_90", 4, 8, 128  # of a Qwen3-4B on an H100 or H200


@dataclass(frozen=True, kw_only=True)
class HostCase(Case):
    """64 trees of 22 trajectories of 3,000 tokens, on one core of whatever machine."""

    measured_by: ClassVar[str] = "host_preparation"

    @property
    def bench(self) -> str:
        """Of its own."""
        return "host_preparation"

    @property
    def name(self) -> str:
        """Trees, leaves, tokens of a trajectory."""
        return f"host_preparation-{TREES}x22x3000"


HOST = HostCase(quick=True)


def measure(case: HostCase, device: str, seconds: float) -> dict[str, Any]:
    """Fields of the record; the GPU of a machine that has one is not used."""
    from forests import SEARCH_3000, random_forest
    from rows import tree_rows

    from atpo_kernels.tree_attention import make_tree_block_lists
    from atpo_kernels.tree_attention.tiles import block_sizes, tiles_for

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    forest = random_forest(TREES, SEARCH_3000, 150_000)
    rows = tree_rows(forest, MAX_TOKENS)
    sizes = block_sizes(tiles_for(_TARGET, torch.bfloat16, _WIDTH), _GROUP)

    def lists(rows: list[Any]) -> None:
        for row in rows:
            make_tree_block_lists(row.subtree_end, sizes, key_heads=_KEY_HEADS)

    parts = {"packing": lambda: tree_rows(forest, MAX_TOKENS), "block lists": lambda: lists(rows)}
    samples, failed = interleaved({"ours": lambda: lists(tree_rows(forest, MAX_TOKENS))} | parts, "cpu", seconds)
    timings = {name: timing(samples[name], failed.get(name)) for name in samples}
    read = clock("cpu")
    torch.set_num_threads(threads)
    return {
        "clock": read,
        "tokens": {"unique": sum(tree.unique_tokens for tree in forest), "flat": sum(t.flat_tokens for t in forest)},
        "rows": len(rows),
        "parts_ms": {name: timings[name]["ms"] for name in parts},
        "implementations": {"ours": {"note": "", "same_work": True, "version": commit()} | timings["ours"]},
    }
