"""BM25 over shards of a corpus, each with its own postings. Scores are those of one index of the whole corpus.

A shard stores, for every word that occurs in it, the passages and their final scores, which hold the idf and the mean
length of the whole corpus (eagerly computed scores: bm25s). Words are known by a 64-bit hash, so that no vocabulary has
to be kept in memory: among 10 million words the chance of any two sharing a hash is 3e-6.

Scripts that are written without spaces (Chinese, Japanese, Thai, ...) are cut into pairs of neighbouring characters,
and so is Korean, whose particles stand at the end of words: a query finds what contains it. Passages are also found by
single characters. See `scripts.py`.

Scores are bm25s's "lucene" variant, bit for bit:

    score(word, passage) = idf(word) · tf / (k1·((1 − b) + b·length/mean length) + tf)
    idf(word) = ln(1 + (N − df + 0.5) / (df + 0.5))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
from numpy.typing import NDArray

from atpo_fast.common.files import replacing
from atpo_fast.retrieval.scripts import by_script

_TOKENS: dict[str, Any] = {"token_pattern": r"(?u)\b\w+\b", "stopwords": "en"}  # lower-case words, no stemming
_CHUNK = 4096  # passages counted at once
_SCORE_BLOCK = 1 << 20  # postings scored at once


@dataclass(frozen=True, slots=True)
class Postings:
    """The occurrences of words in N passages: W different words, P pairs of word and passage, sorted by both."""

    words: NDArray[np.uint64]  # (W,) hashes, ascending
    starts: NDArray[np.int64]  # (W + 1,) first pair of each word
    passages: NDArray[np.int32]  # (P,) number of the passage among the N
    weights: NDArray[np.float32]  # (P,) count of the word in the passage, or its score there
    lengths: NDArray[np.int32]  # (N,) words of each passage; not needed once scored


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of the whole corpus that scores depend on."""

    words: NDArray[np.uint64]  # (V,) hashes, ascending
    frequencies: NDArray[np.int64]  # (V,) number of passages that hold the word
    passages: int  # number of passages
    tokens: int  # number of words of all passages, repetitions included

    @classmethod
    def empty(cls) -> Statistics:
        """Return the statistics of an empty corpus."""
        return cls(np.zeros(0, np.uint64), np.zeros(0, np.int64), 0, 0)

    def add(self, postings: Postings) -> Statistics:
        """Return the statistics with the passages of one more shard added."""
        words, places = np.unique(np.concatenate([self.words, postings.words]), return_inverse=True)
        counts = np.concatenate([self.frequencies, np.diff(postings.starts)])
        frequencies = np.zeros(len(words), np.int64)
        np.add.at(frequencies, places, counts)
        return Statistics(
            words, frequencies, self.passages + len(postings.lengths), self.tokens + int(postings.lengths.sum())
        )

    def idf(self, words: NDArray[np.uint64]) -> NDArray[np.float32]:
        """Return the (W,) inverse document frequencies of words that occur in the corpus."""
        different, places = np.unique(self.frequencies[np.searchsorted(self.words, words)], return_inverse=True)
        logs = [math.log(1 + (self.passages - df + 0.5) / (df + 0.5)) for df in different.tolist()]
        return np.array(logs, dtype=np.float32)[places]


class BM25Index:
    """A BM25 index over the shards of a corpus.

    Search is deterministic: equal scores are ordered by the number of the passage. Passages that share no word with the
    query are not hits.
    """

    def __init__(self, shards: Sequence[Postings], sizes: Sequence[int]) -> None:
        self._shards = [_Shard(postings, size) for postings, size in zip(shards, sizes, strict=True)]
        self._passages = sum(sizes)

    @classmethod
    def from_texts(cls, texts: Sequence[str], k1: float = 0.9, b: float = 0.4) -> BM25Index:
        """Build an index of some texts in memory."""
        counted = count_words(texts)
        return cls([score(counted, Statistics.empty().add(counted), k1, b)], [len(texts)])

    def __len__(self) -> int:
        """Return the number of passages."""
        return self._passages

    def search(self, queries: Sequence[str], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return (Q, k) numbers of the best passages and (Q, k) scores, best first; -1 and 0 pad missing hits."""
        numbers = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.zeros((len(queries), k), dtype=np.float32)
        words = [hash_words(words) for words in split_words([by_script(query) for query in queries])]
        first = 0
        for shard in self._shards:  # shard by shard, so that a shard's pages serve all queries
            for query, hashes in enumerate(words):
                better, their_scores = shard.best(hashes, k, scores[query, -1])
                if len(better):
                    both = np.concatenate([scores[query], their_scores])
                    kept = np.argsort(-both, kind="stable")[:k]  # former hits come first among equals
                    numbers[query] = np.concatenate([numbers[query], first + better])[kept]
                    scores[query] = both[kept]
            first += shard.size
        return numbers, scores


class _Shard:
    """A shard whose scores bm25s adds up with the words of the shard as its vocabulary."""

    def __init__(self, postings: Postings, size: int) -> None:
        self.size = size
        self._words = postings.words
        self._index = bm25s.BM25()
        self._index.nonoccurrence_array = None
        self._index.scores = {
            "data": postings.weights,
            "indices": postings.passages,
            "indptr": postings.starts,
            "num_docs": size,
        }

    def best(
        self, words: NDArray[np.uint64], k: int, floor: np.float32
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return at most k passages that score above `floor`, best first, and their scores. `words`: (n,) hashes."""
        columns = np.searchsorted(self._words, words)
        known = columns < len(self._words)
        known[known] = self._words[columns[known]] == words[known]
        if not known.any():
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        scores = self._index.get_scores_from_ids(columns[known])
        candidates = np.flatnonzero(scores > floor)
        if len(candidates) > k:
            found = scores[candidates]
            candidates = candidates[found >= np.partition(found, len(found) - k)[len(found) - k]]
        candidates = candidates[np.argsort(-scores[candidates], kind="stable")[:k]]
        return candidates, scores[candidates]


def split_words(texts: Sequence[str]) -> list[list[str]]:
    """Split each text into lower-case words without English stop words."""
    words = bm25s.tokenize(list(texts), return_ids=False, show_progress=False, **_TOKENS)
    assert isinstance(words, list)
    return words


def hash_words(words: Iterable[str]) -> NDArray[np.uint64]:
    """Return (n,) 64-bit hashes of words, the same on every machine."""
    digests = b"".join(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest() for word in words)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64, copy=False)


def count_words(texts: Iterable[str]) -> Postings:
    """Count the words of texts: postings whose weights are counts."""
    counted = list(_count_chunks(texts))
    words = np.concatenate([chunk[0] for chunk in counted] or [np.zeros(0, np.uint64)])
    order = np.argsort(words, kind="stable")  # keeps passages ascending
    passages = np.concatenate([chunk[1] for chunk in counted] or [np.zeros(0, np.int32)])[order]
    counts = np.concatenate([chunk[2] for chunk in counted] or [np.zeros(0, np.float32)])[order]
    lengths = np.concatenate([chunk[3] for chunk in counted] or [np.zeros(0, np.int32)])
    del counted
    words = words[order]
    new = np.flatnonzero(np.diff(words, prepend=~words[:1]))
    return Postings(words[new], np.append(new, len(words)).astype(np.int64), passages, counts, lengths)


def score(counted: Postings, statistics: Statistics, k1: float, b: float) -> Postings:
    """Compute BM25 scores from counts: postings whose weights are scores."""
    idf = np.repeat(statistics.idf(counted.words), np.diff(counted.starts))
    mean_length = statistics.tokens / statistics.passages if statistics.tokens else 1.0
    norms = k1 * ((1 - b) + b * counted.lengths / mean_length)
    scores = np.empty(len(counted.weights), dtype=np.float32)
    for start in range(0, len(scores), _SCORE_BLOCK):
        block = slice(start, start + _SCORE_BLOCK)
        counts = counted.weights[block].astype(np.float64)
        scores[block] = idf[block] * (counts / (norms[counted.passages[block]] + counts))
    return Postings(counted.words, counted.starts, counted.passages, scores, counted.lengths)


def write_postings(postings: Postings, path: Path, *, lengths: bool) -> None:
    """Write a file atomically: header (N or 0, W, P), words, starts, passages, weights, and lengths if asked for."""
    header = [len(postings.lengths) if lengths else 0, len(postings.words), len(postings.passages)]
    with replacing(path) as partial, partial.open("wb") as file:
        np.array(header, dtype=np.int64).tofile(file)
        for values in (postings.words, postings.starts, postings.passages, postings.weights):
            values.tofile(file)
        if lengths:
            postings.lengths.tofile(file)


def read_postings(path: Path) -> Postings:
    """Memory-map postings that `write_postings` wrote."""
    content = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    passages, words, pairs = content[:24].view(np.int64).tolist()
    ends = list(accumulate([24, 8 * words, 8 * (words + 1), 4 * pairs, 4 * pairs, 4 * passages]))
    parts = [content[start:end] for start, end in pairwise(ends)]
    return Postings(
        parts[0].view(np.uint64),
        parts[1].view(np.int64),
        parts[2].view(np.int32),
        parts[3].view(np.float32),
        parts[4].view(np.int32),
    )


def open_bm25(folder: Path) -> BM25Index:
    """Open the index that `bm25_build.build` has written to `folder`."""
    sizes = np.load(folder / "shards" / "sizes.npy").tolist()
    return BM25Index([read_postings(scores_path(folder, shard)) for shard in range(len(sizes))], sizes)


def scores_path(folder: Path, shard: int) -> Path:
    """Return the path of a shard's scores, the file that a search reads."""
    return folder / "shards" / f"{shard:05d}.scores"


def _count_chunks(
    texts: Iterable[str],
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]]:
    """Yield words, passages and counts of the pairs of each chunk, ascending in passages, and the passages' lengths."""
    remaining, first = iter(texts), 0
    while chunk := list(islice(remaining, _CHUNK)):
        spaced = [by_script(text, singles=True) for text in chunk]
        split = bm25s.tokenize(spaced, return_ids=True, show_progress=False, **_TOKENS)
        lengths = np.array([len(ids) for ids in split.ids], dtype=np.int32)
        ids = np.fromiter(chain.from_iterable(split.ids), dtype=np.int64, count=int(lengths.sum()))
        vocabulary = max(len(split.vocab), 1)
        keys = np.repeat(np.arange(len(chunk)), lengths) * vocabulary + ids
        pairs, counts = np.unique(keys, return_counts=True)
        words = hash_words(split.vocab)[pairs % vocabulary] if len(pairs) else np.zeros(0, np.uint64)
        yield words, (first + pairs // vocabulary).astype(np.int32), counts.astype(np.float32), lengths
        first += len(chunk)
