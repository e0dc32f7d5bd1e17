"""Keep questions out of training that are asked in an evaluation, word for word or nearly so.

Two questions are near-duplicates if they share most of their rare words. Their similarity is the Jaccard index of their
words, each weighted by how rare it is among all questions at hand, log((N + 1) / n) for a word in n of N questions:
benchmarks ask by templates ("Where was the director of film X born?"), and questions that share a template and not X
must not count as near. All pairs above the threshold are found, by an index of the rarest words of each question: a
pair above it shares one of those (prefix filtering, Bayardo et al., 2007).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

NEAR = 0.65
"""Similarity from which questions count as near-duplicates.

Measured on HotpotQA, 2WikiMultihopQA, MuSiQue and NQ: above it two questions are nearly always about the same thing
("who has the most followers on the instagram"), below it less and less often.
"""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """The protected question that a training question repeats, or comes nearest to."""

    kind: Literal["exact", "near"]
    set: str
    question: str
    similarity: float  # 1 for an exact one


def normalise_question(text: str) -> str:
    """Return the key of the overlap check: lower case, one space for each run of what is no letter or digit."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def find_overlaps(
    questions: Sequence[str], protected: Mapping[str, Sequence[str]], near: float | None = NEAR
) -> list[Overlap | None]:
    """Find for each question the protected one that it repeats; None for a question that repeats none.

    Args:
        questions: training questions.
        protected: evaluation questions by the name of their set.
        near: similarity of a near-duplicate, above 0 and at most 1; None: only exact ones are looked for.

    Raises:
        ValueError: `near` is out of range.
    """
    if near is not None and not 0 < near <= 1:
        raise ValueError(f"the similarity of near-duplicates must be above 0 and at most 1, not {near}")
    known: dict[str, tuple[str, str]] = {}
    for name, texts in protected.items():
        for text in texts:
            known.setdefault(normalise_question(text), (name, text))
    known.pop("", None)
    keys = [normalise_question(text) for text in questions]
    found: list[Overlap | None] = [
        Overlap(kind="exact", set=known[key][0], question=known[key][1], similarity=1.0) if key in known else None
        for key in keys
    ]
    if near is None:
        return found
    index = _RareWords(list(known), keys, near)
    for i, key in enumerate(keys):
        nearest = None if found[i] else index.nearest(key)
        if nearest is not None:
            name, text = known[nearest[0]]
            found[i] = Overlap(kind="near", set=name, question=text, similarity=nearest[1])
    return found


class _RareWords:
    """An index of protected questions by their rarest words.

    Args:
        texts: normalised protected questions.
        others: normalised questions that will be asked for, which the weights of words are computed from as well.
        near: smallest similarity that is looked for.
    """

    def __init__(self, texts: Sequence[str], others: Sequence[str], near: float):
        self._near = near
        self._texts = texts
        self._words = [_words(text) for text in texts]
        uses = Counter(word for words in self._words for word in words)
        uses.update(word for text in others for word in _words(text))
        total = len(texts) + len(others)
        self._weights = {word: math.log((total + 1) / count) for word, count in uses.items()}
        self._sums = [self._sum(words) for words in self._words]
        self._index: dict[str, list[int]] = defaultdict(list)
        for i, words in enumerate(self._words):
            for word in self._prefix(words):
                self._index[word].append(i)

    def nearest(self, text: str) -> tuple[str, float] | None:
        """Return the protected question nearest to another one, and their similarity; None below the threshold."""
        words = _words(text)
        weight = self._sum(words)
        best: tuple[str, float] | None = None
        for i in {i for word in self._prefix(words) for i in self._index.get(word, ())}:
            shared = self._sum(words & self._words[i])
            similarity = shared / (weight + self._sums[i] - shared)
            if similarity >= self._near and (best is None or (similarity, self._texts[i]) > (best[1], best[0])):
                best = self._texts[i], similarity
        return best

    def _sum(self, words: set[str] | frozenset[str]) -> float:
        return sum(self._weights[word] for word in sorted(words))

    def _prefix(self, words: frozenset[str]) -> list[str]:
        """Return the rarest words, so many that a question without any of them is not similar enough."""
        rest = self._sum(words)
        enough = self._near * rest * (1 - 1e-9)
        prefix = []
        for word in sorted(words, key=lambda word: (-self._weights[word], word)):
            if rest < enough:
                break
            prefix.append(word)
            rest -= self._weights[word]
        return prefix


def _words(text: str) -> frozenset[str]:
    """Return the words of a text; in scripts without spaces each character is one."""
    return frozenset(_WORD.findall(text))
