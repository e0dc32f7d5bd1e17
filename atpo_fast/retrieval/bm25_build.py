"""Build a BM25 index on disk, in memory that depends on the size of a shard and hardly on that of the corpus.

1. Shard by shard: count the words and store the counts (`NNNNN.counts`).
2. Add up the statistics of the whole corpus (`statistics.npz`).
3. Shard by shard: turn counts into scores (`NNNNN.scores`).

A build that was killed continues after the last complete shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from atpo_fast.common.files import replacing
from atpo_fast.config.retrieval import BM25Settings
from atpo_fast.retrieval.bm25 import (
    Postings,
    Statistics,
    count_words,
    read_postings,
    score,
    scores_path,
    write_postings,
)
from atpo_fast.retrieval.documents import Documents
from atpo_fast.retrieval.index import Report

_REPORT_EVERY = 1000


def build(folder: Path, documents: Documents, settings: BM25Settings, report: Report) -> None:
    """Build the shards of all documents in `folder`, or those that are missing.

    Raises:
        DataError: a document cannot be read or has no text; names file and document.
    """
    (folder / "shards").mkdir(exist_ok=True)
    starts = range(0, len(documents), settings.shard_passages)
    sizes = [min(settings.shard_passages, len(documents) - start) for start in starts]
    np.save(folder / "shards" / "sizes.npy", sizes)
    if not _statistics_path(folder).exists():
        for shard, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            if not _counts_path(folder, shard).exists():
                texts = _texts(documents, start, start + size, report)
                write_postings(count_words(texts), _counts_path(folder, shard), lengths=True)
        _write_statistics(folder, len(sizes), report)
    statistics = _read_statistics(folder)
    for shard in range(len(sizes)):
        report("scoring shards", shard, len(sizes))
        counts = _counts_path(folder, shard)
        if not scores_path(folder, shard).exists():
            scored = score(read_postings(counts), statistics, settings.k1, settings.b)
            write_postings(scored, scores_path(folder, shard), lengths=False)
        counts.unlink(missing_ok=True)
    report("scoring shards", len(sizes), len(sizes))


def _texts(documents: Documents, start: int, stop: int, report: Report) -> Iterator[str]:
    for number in range(start, stop):
        if number % _REPORT_EVERY == 0:
            report("counting words of passages", number, len(documents))
        yield documents.contents(number)
    report("counting words of passages", stop, len(documents))


def _write_statistics(folder: Path, shards: int, report: Report) -> None:
    statistics = Statistics.empty()
    for shard in range(shards):
        report("adding up shards", shard, shards)
        statistics = statistics.add(_counted(folder, shard))
    with replacing(_statistics_path(folder)) as partial, partial.open("wb") as file:
        np.savez(
            file,
            words=statistics.words,
            frequencies=statistics.frequencies,
            totals=[statistics.passages, statistics.tokens],
        )


def _read_statistics(folder: Path) -> Statistics:
    with np.load(_statistics_path(folder)) as stored:
        passages, tokens = stored["totals"].tolist()
        return Statistics(stored["words"], stored["frequencies"], passages, tokens)


def _counted(folder: Path, shard: int) -> Postings:
    return read_postings(_counts_path(folder, shard))


def _counts_path(folder: Path, shard: int) -> Path:
    return folder / "shards" / f"{shard:05d}.counts"


def _statistics_path(folder: Path) -> Path:
    return folder / "shards" / "statistics.npz"
