"""Cases of the attention of one layer, over a row that holds one tree of 22 leaves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from bench.core.case import Case

HEADS = {"qwen3-0.6b, 1.7b": (16, 8, 128), "qwen3-4b": (32, 8, 128)}
ROWS = (16384, 32768, 65536)
CPU_ROW = 2048


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """Attention over one row, forward or forward and backward."""

    measured_by: ClassVar[str] = "bench.attention.measure"
    mode: Literal["forward", "gradient"] = "gradient"
    row_tokens: int
    """Tokens of the row; the tree's lengths are scaled to it."""
    heads: tuple[int, int, int]  # query heads, key heads, width
    dtype: str = "bfloat16"

    @property
    def bench(self) -> str:
        """Kind of the case's records: the name of the operator."""
        return "tree_attention"

    @property
    def name(self) -> str:
        """Name of the case: mode, tokens, heads and dtype."""
        return f"tree_attention-{self.mode}-{self.row_tokens}-{'x'.join(map(str, self.heads))}-{self.dtype}"


def for_device(kind: str) -> list[AttentionCase]:
    """List the cases of "cuda" or "cpu"."""
    if kind == "cpu":
        heads = HEADS["qwen3-0.6b, 1.7b"]
        base = AttentionCase(row_tokens=CPU_ROW, heads=heads, dtype="float32", peers=("sdpa", "causal"))
        return [base, replace(base, mode="forward"), replace(base, row_tokens=2 * CPU_ROW)]
    peers = ("flex", "flex_static", "flex_dense", "areal", "causal")
    main, other = HEADS["qwen3-4b"], HEADS["qwen3-0.6b, 1.7b"]
    gradient = [AttentionCase(row_tokens=tokens, heads=main, peers=peers, quick=True) for tokens in ROWS]
    rest = [replace(case, heads=other, quick=False) for case in gradient]
    rest += [replace(case, mode="forward", quick=False) for case in [*gradient, *rest]]
    small = AttentionCase(row_tokens=ROWS[0] // 2, heads=main, peers=(*peers, "sdpa"))
    return [*gradient, *rest, small, replace(small, mode="forward")]
