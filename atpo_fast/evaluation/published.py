"""Published results, for the tables: exact match in per cent, as printed beside the code of AT²PO (arXiv:2601.04767).

They are of other models, on whole evaluation sets, with E5 retrieval over 21 million passages of Wikipedia (wiki-18).
The row of a bare model is its ReAct prompt without training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """A row of the published table."""

    label: str
    exact_match: Mapping[str, float]
    """Per cent by benchmark."""
    averages: Mapping[str, float]
    """Averages as printed, by group, weighted by the numbers of questions."""


SOURCE = "README of zzfoutofspace/ATPO"
SIZES: Mapping[str, int] = {
    "HotpotQA": 7405,
    "2Wiki": 12576,
    "MuSiQue": 2417,
    "Bamboogle": 125,
    "NQ": 3610,
    "TriviaQA": 11313,
    "PopQA": 14267,
}
"""Numbers of questions of the published evaluation sets: dev of the first three, test of the others."""

_MULTI_HOP = ("HotpotQA", "2Wiki", "MuSiQue", "Bamboogle")
_SINGLE_HOP = ("NQ", "TriviaQA", "PopQA")
_ROWS: tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...] = (  # each group's benchmarks, then its average
    ("Qwen3-4B", (30.42, 32.92, 12.83, 44.80, 30.01), (26.75, 53.53, 35.34, 41.31)),
    ("Qwen3-4B + GRPO", (44.76, 51.40, 21.60, 50.40, 46.02), (45.98, 65.17, 49.18, 54.97)),
    ("Qwen3-4B + DAPO", (45.95, 51.81, 21.68, 51.20, 46.65), (47.50, 65.84, 51.03, 56.33)),
    ("Qwen3-4B + GSPO", (47.07, 49.25, 22.68, 50.40, 45.69), (46.01, 64.24, 48.50, 54.28)),
    ("Qwen3-4B + AEPO", (46.36, 51.78, 23.47, 50.40, 46.95), (45.71, 64.66, 50.13, 55.20)),
    ("Qwen3-4B + AT²PO", (49.44, 52.99, 24.80, 56.80, 48.81), (47.90, 65.32, 51.81, 56.44)),
    ("Qwen3-8B", (20.66, 19.05, 9.56, 37.60, 18.66), (21.16, 41.81, 27.37, 32.19)),
    ("Qwen3-8B + GRPO", (47.01, 53.69, 21.35, 54.40, 48.03), (45.70, 67.42, 50.17, 56.29)),
    ("Qwen3-8B + DAPO", (49.64, 53.91, 24.05, 56.00, 49.40), (51.99, 69.02, 51.90, 58.53)),
    ("Qwen3-8B + GSPO", (49.59, 52.55, 24.35, 54.40, 48.56), (45.56, 67.75, 49.66, 56.15)),
    ("Qwen3-8B + AEPO", (49.17, 52.97, 24.01, 54.40, 48.62), (49.92, 68.31, 51.77, 57.94)),
    ("Qwen3-8B + AT²PO", (51.37, 53.97, 26.51, 56.00, 50.15), (51.33, 69.51, 52.26, 58.82)),
    ("Qwen2.5-7B", (2.85, 1.94, 0.58, 4.00, 2.10), (4.34, 10.67, 9.32, 9.23)),
    ("Qwen2.5-7B + GRPO", (47.94, 46.89, 21.27, 47.20, 44.48), (45.56, 64.86, 49.92, 55.20)),
    ("Qwen2.5-7B + DAPO", (47.50, 47.93, 21.27, 44.00, 44.91), (52.24, 65.00, 50.01, 56.08)),
    ("Qwen2.5-7B + GSPO", (47.35, 47.30, 20.32, 44.00, 44.40), (49.64, 62.87, 49.75, 54.81)),
    ("Qwen2.5-7B + Tree-GRPO", (42.39, 42.01, 20.15, 42.40, 39.79), (47.56, 62.69, 44.75, 52.04)),
    ("Qwen2.5-7B + AEPO", (47.05, 47.53, 21.03, 44.00, 44.51), (49.00, 64.13, 50.21, 55.45)),
    ("Qwen2.5-7B + AT²PO", (49.58, 48.04, 22.56, 51.20, 45.83), (52.91, 64.90, 50.44, 56.34)),
)


PUBLISHED = tuple(
    PublishedRow(
        label,
        dict(zip((*_MULTI_HOP, *_SINGLE_HOP), (*multi[:-1], *single[:-1]), strict=True)),
        {"multi-hop": multi[-1], "single-hop": single[-1]},
    )
    for label, multi, single in _ROWS
)
