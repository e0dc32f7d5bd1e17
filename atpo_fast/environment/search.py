"""Search tools: an index in process, or a retrieval server. Both format their hits as published."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from atpo_fast.common.certificates import certificates
from atpo_fast.common.errors import ConfigError, DataError, ToolFailureError
from atpo_fast.common.secrets import redacted
from atpo_fast.config.retrieval import MAX_QUERY_CHARS
from atpo_fast.data.questions import Passage
from atpo_fast.retrieval import BM25Index, Index, document_contents, open_index

NO_RESULTS = "No search results found."
_MAX_HITS = 10
_MAX_DETAIL = 200  # characters of what a server says about a refusal
_PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_DESCRIPTION = "Finds passages about a query."
_PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}


class IndexSearch:
    """The search tool over an index of any kind, in process.

    Args:
        index: finds passages by number.
        contents: the text of a passage.
        top_k: number of hits per query.
        passage_chars: number of characters to which a hit is cut.
    """

    name = "search"
    description, parameters = _DESCRIPTION, _PARAMETERS

    def __init__(
        self, index: Index, contents: Callable[[int], str], *, top_k: int = 3, passage_chars: int = 1000
    ) -> None:
        self.top_k = top_k
        self.passage_chars = passage_chars
        self._index = index
        self._contents = contents

    @classmethod
    def open(cls, folder: str | Path, *, kind: str, top_k: int = 3, passage_chars: int = 1000) -> IndexSearch:
        """Search in an index folder that `atpo-fast retriever` has built; nothing of it is loaded into memory at once.

        Raises:
            FileNotFoundError: no finished index there.
            ValueError: an index of another kind than `kind`.
        """
        retriever = open_index(folder)
        if retriever.kind != kind:
            raise ValueError(f"{folder} holds a {retriever.kind} index; set tools.search_backend={retriever.kind}")
        return cls(retriever.index, retriever.documents.contents, top_k=top_k, passage_chars=passage_chars)

    def __call__(self, argument: str) -> str:
        """Return the formatted hits of one query."""
        return self.run_many([argument])[0]

    def run_many(self, queries: list[str]) -> list[str]:
        """Return the formatted hits of many queries."""
        numbers, _ = self._index.search([clean_query(query) for query in queries], min(self.top_k, len(self._index)))
        return [
            format_hits([self._contents(number) for number in row if number >= 0], self.passage_chars)
            for row in numbers.tolist()
        ]


class BM25Search(IndexSearch):
    """The search tool over passages in memory with BM25 (k1 0.9, b 0.4, English stop words, no stemming).

    Deterministic: equal scores are ordered by the position of the passage. Passages that share no word with the query
    are not hits.

    Args:
        passages: the corpus; `Passage.contents` is indexed and returned.
        top_k: number of hits per query.
        passage_chars: number of characters to which a hit is cut.

    Raises:
        ValueError: no passages.
    """

    def __init__(
        self, passages: Sequence[Passage], *, top_k: int = 3, passage_chars: int = 1000, k1: float = 0.9, b: float = 0.4
    ) -> None:
        if not passages:
            raise ValueError(
                "BM25 search needs passages and was given none: name corpus files in data.corpus_files, or an index "
                "folder in tools.index_dir"
            )
        contents = [passage.contents for passage in passages]
        index = BM25Index.from_texts(contents, k1, b)
        super().__init__(index, contents.__getitem__, top_k=top_k, passage_chars=passage_chars)


class HTTPSearch:
    """The search tool over a retrieval server: `POST {"queries": [...], "topk": k, "return_scores": true}`.

    The answer is `{"result": [per query: [{"document": {...}, "score": ...}, ...]]}`, best first; bare documents are
    understood too. A document has `contents`, or `title` and `text`; other common names are read as well
    (`document_contents`).

    Connections are kept open between requests, and go straight to the server: a retrieval server stands in the local
    network as a rule, so the proxies that the environment names (HTTP_PROXY, ALL_PROXY) are not used, and an error of
    the first request says so.

    Args:
        url: address of the server.
        top_k: number of hits per query.
        passage_chars: number of characters to which a hit is cut.
        timeout_seconds: longest time to connect, and then to wait for the next bytes of the answer.
        token_variable: environment variable that holds the token which the server asks for; none: no token is sent.

    Raises:
        ConfigError: that variable is empty.
    """

    name = "search"
    description, parameters = _DESCRIPTION, _PARAMETERS

    def __init__(
        self,
        url: str,
        *,
        top_k: int = 3,
        passage_chars: int = 1000,
        timeout_seconds: float = 120.0,
        token_variable: str | None = None,
    ) -> None:
        self.url = url
        self.top_k = top_k
        self.passage_chars = passage_chars
        self._client = httpx.Client(
            timeout=timeout_seconds,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),  # the tool box has limits
            trust_env=False,
            verify=certificates(trust_env=False),
            headers={} if token_variable is None else {"Authorization": f"Bearer {_token(token_variable)}"},
        )

    def __call__(self, argument: str) -> str:
        """Return the formatted hits of one query. Raises as `run_many`."""
        return self.run_many([argument])[0]

    def run_many(self, queries: list[str]) -> list[str]:
        """Return the formatted hits of many queries, which are one request.

        Raises:
            ConnectionError: no answer, or an HTTP error.
            TimeoutError: no answer in time.
            ValueError: the answer is not of the protocol.
        """
        body = {"queries": [clean_query(query) for query in queries], "topk": self.top_k, "return_scores": True}
        where = f"retrieval server {redacted(self.url)}"
        try:
            response = self._client.post(self.url, json=body).raise_for_status()
        except httpx.TimeoutException as error:
            raise TimeoutError(f"{where}: no answer in time ({type(error).__name__})") from error
        except httpx.HTTPStatusError as error:
            detail = " ".join(error.response.text[:_MAX_DETAIL].split())
            raise ConnectionError(f"{where}: status {error.response.status_code}: {detail}") from error
        except httpx.HTTPError as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ConnectionError(f"{where}: {redacted(reason)}") from error
        try:
            answer = json.loads(response.content.decode(errors="replace"))  # passages are not always UTF-8
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: its answer is no JSON: {error}") from None
        found = answer.get("result") if isinstance(answer, dict) else None
        if not isinstance(found, list) or len(found) != len(queries):
            raise ValueError(f'{where}: expected {{"result": [...]}} with {len(queries)} lists of hits')
        try:
            return [format_hits(_texts(hits), self.passage_chars) for hits in found]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def probe(self) -> None:
        """Ask the server for the hits of one query, to see whether it is there and speaks the protocol.

        Raises:
            ToolFailureError: no answer, or one that cannot be used; says what to do.
        """
        try:
            self("probe")
        except (OSError, ValueError) as error:
            proxies = sorted({name for name in os.environ if name.upper() in _PROXY_VARIABLES and os.environ[name]})
            unused = f" ({', '.join(proxies)} of the environment are not used for it)" if proxies else ""
            raise ToolFailureError(
                f"{error}{unused}. Start a retrieval server (`atpo-fast retriever --corpus FILE`), or name one in "
                "tools.search_url"
            ) from error

    def __enter__(self) -> HTTPSearch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; a later search opens new ones."""
        self._client.close()


def clean_query(query: str) -> str:
    """Strip a query, remove its double quotes, and cut it at `MAX_QUERY_CHARS`: a search takes time for every word."""
    return query.replace('"', "").strip()[:MAX_QUERY_CHARS]


def _token(variable: str) -> str:
    token = os.environ.get(variable)
    if not token:
        raise ConfigError(f"tools.search_token_variable={variable}: the environment variable is empty; set it")
    return token


def format_hits(contents: Sequence[str], passage_chars: int) -> str:
    """Return lines `Page 1: ...` of at most 10 different hits, each cut to `passage_chars` characters."""
    pages = list(dict.fromkeys(text for text in (content.strip() for content in contents) if text))[:_MAX_HITS]
    if not pages:
        return NO_RESULTS
    return "\n".join(f"Page {number}: {page[:passage_chars]}" for number, page in enumerate(pages, start=1))


def _texts(hits: Any) -> list[str]:
    """Return the texts of one query's hits. Documents without text are left out where others have one.

    Raises ValueError where none has, with the fields that the first has instead, and for anything but documents.
    """
    if not isinstance(hits, list):
        raise ValueError(f"expected a list of hits for each query, not {type(hits).__name__}")
    if others := [hit for hit in hits if not isinstance(hit, dict | str)]:
        raise ValueError(f"a hit must be an object or a text, not {type(others[0]).__name__}")
    texts, fault = [], None
    for hit in hits:
        try:
            texts.append(document_contents(hit))
        except DataError as error:
            fault = fault or error
    if fault is not None and not texts:
        raise fault
    return texts
