"""The retrieval server: `POST /retrieve` as published with Search-R1 and AT2PO, and `GET /health`."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel, Field

from atpo_fast.config.retrieval import MAX_HITS
from atpo_fast.retrieval.batching import Batcher
from atpo_fast.retrieval.index import Retriever

Found = tuple[bytes, bytes]  # JSON array of one query's hits: documents with scores, bare documents


class RetrieveRequest(BaseModel):
    """The body of a `POST /retrieve` request."""

    queries: list[str]
    topk: int | None = Field(default=None, ge=0, le=MAX_HITS)
    """Number of hits per query; missing, null or 0: the server's default."""
    return_scores: bool = False
    """Shape of each query's hits. true: `[{"document": {...}, "score": float}, ...]`. false: `[{...}, ...]`."""


def make_app(
    retriever: Retriever,
    *,
    topk: int = 3,
    wait_seconds: float = 0.002,
    max_batch: int = 256,
    cache_size: int = 10_000,
) -> FastAPI:
    """Make the application that answers the requests.

    Documents are sent as stored. One without `contents` gets it, because published clients read it.

    Args:
        retriever: index and documents that are searched.
        topk: number of hits per query where a request does not say.
        wait_seconds, max_batch, cache_size: see `Batcher`.
    """

    def find(queries: Sequence[str], k: int) -> list[Found]:
        answer = retriever.documents.answer
        return [_encode([(answer(hit.number), hit.score) for hit in hits]) for hits in retriever.hits(queries, k)]

    batcher = Batcher(find, wait_seconds=wait_seconds, max_batch=max_batch, cache_size=cache_size)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        batcher.close()

    app = FastAPI(title="atpo-fast retriever", lifespan=lifespan)

    @app.post("/retrieve")
    async def retrieve(request: RetrieveRequest) -> Response:
        found = await batcher.answer(request.queries, request.topk or topk)
        hits = b",".join(query[0 if request.return_scores else 1] for query in found)
        return Response(b'{"result":[' + hits + b"]}", media_type="application/json")

    @app.get("/health")
    async def health() -> dict[str, str | int]:
        return {"status": "ok", "index": retriever.kind, "passages": len(retriever.index), "topk": topk}

    return app


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket to an address; port 0 is any free one.

    Raises:
        OSError: the address is in use or does not belong to this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def serve(app: FastAPI, bound: socket.socket, started: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; `started` is called once requests are answered.

    Raises:
        OSError: another process listens at the address.
    """
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    _Server(config, started).run(sockets=[bound])


class _Server(uvicorn.Server):
    """A uvicorn server that calls `started` once it answers requests."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._tell()


def _encode(hits: Sequence[tuple[bytes, float]]) -> Found:
    """Encode one query's hits in both shapes of an answer; documents are JSON already."""
    scored = b",".join(b'{"document":%b,"score":%a}' % (document, score) for document, score in hits)
    return b"[" + scored + b"]", b"[" + b",".join(document for document, _ in hits) + b"]"
