"""Published results, for the tables: exact match in per cent, as printed beside the code of AT²PO (arXiv:2601.04767).

They are of other models, on whole evaluation sets, with E5 retrieval over 21 million passages of Wikipedia (wiki-18).
Only rows whose numbers are at hand are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """A row of the published table of one group of benchmarks."""

    label: str
    group: str
    exact_match: Mapping[str, float]
    """Per cent by benchmark."""
    average: float
    """Average as printed, weighted by the numbers of questions."""
    source: str


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

PUBLISHED = (
    PublishedRow(
        label="Qwen3-4B + GRPO",
        group="multi-hop",
        exact_match={"HotpotQA": 44.76, "2Wiki": 51.40, "MuSiQue": 21.60, "Bamboogle": 50.40},
        average=46.0,
        source="README of zzfoutofspace/ATPO, commit 98e60f655eb2",
    ),
)
