"""What every index offers, and an index with the documents that it is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from atpo_fast.retrieval.documents import Documents

Report = Callable[[str, int, int | None], None]
"""Told how far a build is: the phase, what is done, the total (None: unknown)."""


def silent(phase: str, done: int, total: int | None) -> None:
    """A `Report` that says nothing."""


class Index(Protocol):
    """Searches numbered passages."""

    def search(
        self, queries: Sequence[str], k: int
    ) -> tuple[
        NDArray[np.int64],  # (len(queries), k) numbers of the best passages, best first; -1 where there are fewer hits
        NDArray[np.float32],  # (len(queries), k) their scores; 0 where there are fewer hits
    ]:
        """The k best passages of every query."""
        ...

    def __len__(self) -> int:
        """Number of passages."""
        ...


class Hit(NamedTuple):
    """One passage found."""

    number: int  # of the passage in the corpus
    score: float


@dataclass(frozen=True, slots=True)
class Retriever:
    """An index and its documents."""

    kind: str  # bm25 or dense
    index: Index
    documents: Documents

    def hits(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The at most k hits of every query, best first."""
        numbers, scores = self.index.search(queries, min(k, len(self.index)))
        return [
            [Hit(number, score) for number, score in zip(*row, strict=True) if number >= 0]
            for row in zip(numbers.tolist(), scores.tolist(), strict=True)
        ]
