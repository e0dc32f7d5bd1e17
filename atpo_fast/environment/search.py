"""The search tools: BM25 in process, or a retrieval server. Both format their hits as published."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import bm25s
import numpy as np
from numpy.typing import NDArray

from atpo_fast.data.questions import Passage

NO_RESULTS = "No search results found."
_MAX_HITS = 10
_TOKEN_PATTERN = r"(?u)\b\w+\b"


class BM25Search:
    """BM25 over passages, in process (k1 0.9, b 0.4, English stop words, no stemming).

    Deterministic: equal scores are ordered by the position of the passage. Passages that share no word with the query
    are not hits.

    Args:
        passages: the corpus; `Passage.contents` is indexed and returned.
        top_k: hits per query.
        passage_chars: a hit is cut to so many characters.

    Raises:
        ValueError: no passages.
    """

    name = "search"

    def __init__(
        self, passages: Sequence[Passage], *, top_k: int = 3, passage_chars: int = 1000, k1: float = 0.9, b: float = 0.4
    ) -> None:
        if not passages:
            raise ValueError("BM25 search needs passages and was given none: name corpus files in data.corpus_files")
        self.top_k = top_k
        self.passage_chars = passage_chars
        self._contents = [passage.contents for passage in passages]
        self._index = bm25s.BM25(k1=k1, b=b)
        self._index.index(_words(self._contents), show_progress=False)

    def __call__(self, argument: str) -> str:
        """Hits of one query, formatted."""
        return self.run_many([argument])[0]

    def run_many(self, queries: list[str]) -> list[str]:
        """Hits of many queries, formatted."""
        words = _words([clean_query(query) for query in queries])
        return [format_hits([self._contents[i] for i in self._hits(query)], self.passage_chars) for query in words]

    def _hits(self, words: list[str]) -> NDArray[np.int64]:
        """(k,) positions of the best passages, best first; k <= top_k."""
        known = [word for word in words if word in self._index.vocab_dict]
        if not known:
            return np.zeros(0, dtype=np.int64)
        scores = self._index.get_scores(known)
        place = max(0, len(scores) - self.top_k)
        threshold = np.partition(scores, place)[place]
        candidates = np.flatnonzero((scores >= threshold) & (scores > 0))
        return candidates[np.argsort(-scores[candidates], kind="stable")[: self.top_k]]


class HTTPSearch:
    """A retrieval server: `POST {"queries": [...], "topk": k, "return_scores": true}`.

    The answer is `{"result": [per query: [{"document": {...}, "score": ...}, ...]]}`, best first; bare documents are
    understood too. A document has `contents`, or `title` and `text`.
    """

    name = "search"

    def __init__(self, url: str, *, top_k: int = 3, passage_chars: int = 1000, timeout_seconds: float = 120.0) -> None:
        self.url = url
        self.top_k = top_k
        self.passage_chars = passage_chars
        self.timeout_seconds = timeout_seconds

    def __call__(self, argument: str) -> str:
        """Hits of one query, formatted. Raises as `run_many`."""
        return self.run_many([argument])[0]

    def run_many(self, queries: list[str]) -> list[str]:
        """Hits of many queries, formatted, in one request.

        Raises:
            ConnectionError: no answer, or an HTTP error.
            ValueError: the answer is not of the protocol.
        """
        body = {"queries": [clean_query(query) for query in queries], "topk": self.top_k, "return_scores": True}
        request = urllib.request.Request(
            self.url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
                answer = json.load(response)
        except urllib.error.URLError as error:
            raise ConnectionError(f"retrieval server {self.url}: {error}") from error
        found = answer.get("result") if isinstance(answer, dict) else None
        if not isinstance(found, list) or len(found) != len(queries):
            raise ValueError(
                f'retrieval server {self.url}: expected {{"result": [...]}} with {len(queries)} lists of hits'
            )
        return [format_hits([_contents(hit) for hit in hits], self.passage_chars) for hits in found]


def clean_query(query: str) -> str:
    """The query without double quotes."""
    return query.replace('"', "").strip()


def format_hits(contents: Sequence[str], passage_chars: int) -> str:
    """Lines `Page 1: ...` of at most 10 different hits, each cut to `passage_chars` characters."""
    pages = list(dict.fromkeys(text for text in (content.strip() for content in contents) if text))[:_MAX_HITS]
    if not pages:
        return NO_RESULTS
    return "\n".join(f"Page {number}: {page[:passage_chars]}" for number, page in enumerate(pages, start=1))


def _words(texts: list[str]) -> list[list[str]]:
    """Lower-case words without English stop words, per text."""
    words = bm25s.tokenize(texts, token_pattern=_TOKEN_PATTERN, stopwords="en", return_ids=False, show_progress=False)
    assert isinstance(words, list)
    return words


def _contents(hit: dict[str, Any]) -> str:
    """The text of one hit of a retrieval server."""
    document = hit.get("document", hit)
    return str(document.get("contents") or f'"{document.get("title", "")}"\n{document.get("text", "")}')
