"""Settings of the retriever's indices, BM25 and dense, and the limits of its server."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

Faiss = Literal["flat", "ivf", "hnsw"]
VectorDtype = Literal["float16", "float32"]

MAX_HITS = 1000  # number of hits that one query may ask for
MAX_QUERY_CHARS = 10_000  # number of characters at which our search tools cut a query; also the server's default limit


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """What one request, and all of them together, may take of a retrieval server.

    A request beyond a limit is refused with the limit in words. The defaults admit what published trainers send in one
    request (2,560 queries).
    """

    body_bytes: int = 4 << 20  # bytes of a request's body
    held_bytes: int = 256 << 20  # bytes of the bodies of all requests that are read or wait for an answer
    queries: int = 4096  # queries of a request
    query_chars: int = MAX_QUERY_CHARS  # characters of a query
    hits: int = 40_960  # hits of a request: its queries times topk
    connections: int = 1024  # open connections; requests beyond are refused
    read_seconds: float = 20.0  # time to send a request; a connection without a request is closed then
    answer_seconds: float = 600.0  # time from a request to the end of its answer, which a client may read slowly


@dataclass(frozen=True, slots=True)
class BM25Settings:
    """Settings of a BM25 index."""

    kind: ClassVar[str] = "bm25"
    k1: float = 0.9
    b: float = 0.4
    shard_passages: int = 250_000  # number of passages of a shard, which bounds the memory of the build

    def identity(self) -> dict[str, Any]:
        """Return the settings on which the index depends."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSettings:
    """Settings of a dense index."""

    kind: ClassVar[str] = "dense"
    encoder: str  # folder of a Hugging Face encoder, or its name on the hub
    faiss: Faiss = "flat"  # kind of search. flat: exact. ivf: the nearest lists only. hnsw: a graph of neighbours
    vector_dtype: VectorDtype = "float16"
    query_prefix: str = "query: "
    passage_prefix: str = "passage: "
    max_tokens: int = 256  # number of tokens to which a text is cut
    batch_texts: int = 64  # number of texts of one forward

    def identity(self) -> dict[str, Any]:
        """Return the settings on which the vectors and the encoding of queries depend."""
        folder = Path(self.encoder)
        return {
            "encoder": str(folder.resolve()) if folder.is_dir() else self.encoder,
            "encoder_files": {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))},
            "vector_dtype": self.vector_dtype,
            "query_prefix": self.query_prefix,
            "passage_prefix": self.passage_prefix,
            "max_tokens": self.max_tokens,
        }
