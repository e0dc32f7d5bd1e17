"""The interface of an index, and an index together with its documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from atpo_fast.retrieval.documents import Documents

Report = Callable[[str, int, int | None], None]
"""Function that is told the progress of a build: the phase, what is done, the total (None: unknown)."""


def silent(phase: str, done: int, total: int | None) -> None:
    """Ignore the progress: a `Report` that prints nothing."""


class Index(Protocol):
    """An index that searches numbered passages."""

    def search(
        self, queries: Sequence[str], k: int
    ) -> tuple[
        NDArray[np.int64],  # (len(queries), k) numbers of the best passages, best first; -1 where there are fewer hits
        NDArray[np.float32],  # (len(queries), k) their scores; 0 where there are fewer hits
    ]:
        """Find the k best passages of every query."""
        ...

    def __len__(self) -> int:
        """Return the number of passages."""
        ...


class Hit(NamedTuple):
    """A passage that a search found, with its score."""

    number: int  # number of the passage in the corpus
    score: float


@dataclass(frozen=True, slots=True)
class Retriever:
    """An index together with the documents that it numbers."""

    kind: str  # bm25 or dense
    index: Index
    documents: Documents

    def hits(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the hits of every query, best first, k at most."""
        numbers, scores = self.index.search(queries, min(k, len(self.index)))
        return [
            [Hit(number, score) for number, score in zip(*row, strict=True) if number >= 0]
            for row in zip(numbers.tolist(), scores.tolist(), strict=True)
        ]
