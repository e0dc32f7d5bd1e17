"""Cases of the attention of one layer, over a row that holds one tree of 22 leaves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from bench.core.case import Case

HEADS = {"qwen3-0.6b, 1.7b": (16, 8, 128), "qwen3-4b": (32, 8, 128)}
ROWS = (16384, 32768, 65536)
STAR = 24576  # 32 answers of 512 tokens to a prompt of 8,192
CPU_ROW = 2048
CANDIDATES = ("key_stages_3", "key_partial_2", "partial_1")
"""Our own implementation with other tiles: see `candidates.py`."""
WINDOWS = {f"window_{size}": size for size in (128, 512)}
"""Our own implementation over a window, beside full attention of the same row; 128 is that of gpt-oss."""
_PLAIN = (("tree", "published"), ("variant", ""))


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """Attention over one row, forward or forward and backward."""

    measured_by: ClassVar[str] = "bench.attention.measure"
    mode: Literal["forward", "gradient"] = "gradient"
    row_tokens: int
    """Tokens of the row; the tree's lengths are scaled to it."""
    heads: tuple[int, int, int]  # query heads, key heads, width
    dtype: str = "bfloat16"
    tree: Literal["published", "star"] = "published"
    """A tree of the published search, or one prompt, a third of the row, with 32 answers."""
    variant: Literal["", "kernels", "windows"] = ""
    """"kernels": ours beside itself with other tiles; see `candidates.py`. "windows": beside itself over windows."""

    def small(self) -> AttentionCase:
        """Shrink the row and the heads."""
        return replace(self, row_tokens=self.row_tokens // 128, heads=(2, 1, 16), dtype="float32")

    @property
    def bench(self) -> str:
        """Kind of the case's records: the name of the operator."""
        return "tree_attention" + {"": "", "kernels": "_candidates", "windows": "_windows"}[self.variant]

    @property
    def name(self) -> str:
        """Name of the case: mode, tokens, heads and dtype."""
        parts = ["tree_attention", self.mode, str(self.row_tokens), "x".join(map(str, self.heads)), self.dtype]
        parts += [] if self.tree == "published" else [self.tree]
        return "-".join([*parts, *([self.variant] if self.variant else [])])

    def fields(self) -> dict[str, Any]:
        """Return what a record says of the case; what is as in the first records is left out."""
        return {key: value for key, value in super().fields().items() if (key, value) not in _PLAIN}


def windows_beside_full(case: AttentionCase) -> AttentionCase:
    """Set windows beside the full attention of a case."""
    return replace(case, variant="windows", peers=tuple(WINDOWS), quick=False)


def for_device(kind: str) -> list[AttentionCase]:
    """List the cases of "cuda" or "cpu"."""
    if kind == "cpu":
        heads = HEADS["qwen3-0.6b, 1.7b"]
        base = AttentionCase(row_tokens=CPU_ROW, heads=heads, dtype="float32", peers=("sdpa", "causal"))
        longer = replace(base, row_tokens=2 * CPU_ROW)
        windows = windows_beside_full(longer)
        return [base, replace(base, mode="forward"), longer, windows, replace(windows, mode="forward")]
    peers = ("flex", "flex_flash", "flex_static", "flex_dense", "areal", "causal", "causal_fa3", "causal_fa4")
    main, other = HEADS["qwen3-4b"], HEADS["qwen3-0.6b, 1.7b"]
    gradient = [AttentionCase(row_tokens=tokens, heads=main, peers=peers, quick=True) for tokens in ROWS]
    rest = [replace(case, heads=other, quick=False) for case in gradient]
    rest += [replace(case, mode="forward", quick=False) for case in [*gradient, *rest]]
    small = AttentionCase(row_tokens=ROWS[0] // 2, heads=main, peers=(*peers, "sdpa"))
    star = replace(small, row_tokens=STAR, tree="star", peers=peers)
    candidates = replace(gradient[1], variant="kernels", peers=CANDIDATES, quick=False)
    windows = windows_beside_full(gradient[1])
    return [*gradient, *rest, small, replace(small, mode="forward"), star, candidates, windows]
