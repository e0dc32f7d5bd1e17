"""The retrieval server: `POST /retrieve` as published with Search-R1 and AT2PO, and `GET /health`."""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, Field, StrictBool, ValidationError, model_validator

from atpo_fast.config.retrieval import MAX_HITS, ServerLimits
from atpo_fast.retrieval.batching import Batcher
from atpo_fast.retrieval.connections import LimitedServer
from atpo_fast.retrieval.index import Retriever
from atpo_fast.retrieval.intake import Intake

Found = tuple[bytes, bytes]  # JSON array of one query's hits: documents with scores, bare documents

_REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"description": "The token is missing or wrong"},
    408: {"description": "The body did not come in time"},
    413: {"description": "More than a request may hold"},
    500: {"description": "The search failed"},
    503: {"description": "Too many requests at once"},
}
_NO_STATUS = 499  # nobody reads it: the client has left


class RetrieveRequest(BaseModel):
    """The body of a `POST /retrieve` request: `queries`, or a single `query` as skyrl-gym posts it."""

    queries: list[str] = Field(default_factory=list)
    query: str | None = None
    """The only query; the answer has the same shape as that of `queries` with one entry."""
    topk: int | None = Field(default=None, ge=0, le=MAX_HITS)
    """Number of hits per query; missing, null or 0: the server's default."""
    return_scores: StrictBool = False
    """Shape of each query's hits. true: `[{"document": {...}, "score": float}, ...]`. false: `[{...}, ...]`."""

    @model_validator(mode="after")
    def _one_of_both(self) -> RetrieveRequest:
        if (self.query is None) == ("queries" not in self.model_fields_set):
            raise ValueError("a request has either queries, a list of texts, or query, one text")
        return self

    def texts(self) -> list[str]:
        """Return the queries, or the only one."""
        return self.queries if self.query is None else [self.query]


def make_app(
    retriever: Retriever,
    *,
    topk: int = 3,
    wait_seconds: float = 0.002,
    max_batch: int = 256,
    cache_bytes: int = 256 << 20,
    limits: ServerLimits | None = None,
    token: str | None = None,
) -> FastAPI:
    """Make the application that answers the requests.

    Documents are sent as stored. One without `contents` gets it, because published clients read it. A request whose
    client has left is searched no further.

    Args:
        retriever: index and documents that are searched.
        topk: number of hits per query where a request does not say.
        wait_seconds, max_batch, cache_bytes: see `Batcher`.
        limits: what requests may take; none: the defaults.
        token: text that requests to `/retrieve` have to name as `Authorization: Bearer TOKEN`; none: nobody is asked.
    """
    limits = limits or ServerLimits()
    intake = Intake(limits)

    def find(queries: Sequence[str], k: int) -> list[Found]:
        answer = retriever.documents.answer
        return [_encode([(answer(hit.number), hit.score) for hit in hits]) for hits in retriever.hits(queries, k)]

    batcher = Batcher(find, weigh=_weigh, wait_seconds=wait_seconds, max_batch=max_batch, cache_bytes=cache_bytes)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        batcher.close()

    app = FastAPI(title="atpo-fast retriever", lifespan=lifespan)

    @app.post("/retrieve", openapi_extra=_documented_body(), responses=_REFUSALS)
    async def retrieve(request: Request) -> Response:
        _check_token(request, token)
        async with intake.body(request) as body:
            asked = _parse(body)
            texts, k = asked.texts(), asked.topk or topk
            intake.check(texts, k)
            found = await _unless_left(request, batcher.answer(texts, k))
        if found is None:
            return Response(status_code=_NO_STATUS)
        hits = b",".join(query[0 if asked.return_scores else 1] for query in found)
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


def serve(app: FastAPI, bound: socket.socket, started: Callable[[], None], limits: ServerLimits | None = None) -> None:
    """Serve until SIGINT or SIGTERM; `started` is called once requests are answered.

    Raises:
        OSError: another process listens at the address.
    """
    limits = limits or ServerLimits()
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
        limit_concurrency=limits.connections,
    )
    LimitedServer(config, started, limits).run(sockets=[bound])


def _check_token(request: Request, token: str | None) -> None:
    """Refuse a request that does not name the token."""
    given = request.headers.get("authorization", "").encode()
    if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
        raise HTTPException(401, "the header Authorization must be Bearer and the server's token")


def _parse(body: bytes) -> RetrieveRequest:
    """Read a body. Refuse it where it is not of the protocol."""
    try:
        return RetrieveRequest.model_validate_json(body)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_context=False, include_input=False)
        raise HTTPException(422, detail) from None


async def _unless_left(request: Request, answering: Any) -> list[Found] | None:
    """Return what a coroutine returns; where the client leaves before, cancel it and return None."""
    answer = asyncio.ensure_future(answering)
    left = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait([answer, left], return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return None
        try:
            found: list[Found] = answer.result()
        except Exception as error:
            raise HTTPException(500, f"the search failed: {type(error).__name__}") from error
        return found
    finally:
        for task in (answer, left):
            task.cancel()


async def _left(request: Request) -> None:
    """Wait until the client has closed the connection; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _documented_body() -> dict[str, Any]:
    """Return the body for the server's own documentation; it is read here and not by FastAPI, which has no limit."""
    schema = RetrieveRequest.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _weigh(found: Found) -> int:
    return len(found[0]) + len(found[1])


def _encode(hits: Sequence[tuple[bytes, float]]) -> Found:
    """Encode one query's hits in both shapes of an answer; documents are JSON already."""
    scored = b",".join(b'{"document":%b,"score":%a}' % (document, score) for document, score in hits)
    return b"[" + scored + b"]", b"[" + b",".join(document for document, _ in hits) + b"]"
