"""What the retrieval server takes in: bodies of bounded size, read in bounded time, of bounded size together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import HTTPException, Request

from atpo_fast.config.retrieval import ServerLimits


class Intake:
    """The bodies of the requests that are read or wait for an answer.

    Args:
        limits: what requests may take.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._held = 0  # bytes

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """Read the body of a request. It counts as held until the block ends.

        Raises:
            HTTPException: 413 for a body that is too large, 503 where the bodies of all requests are, 408 for one that
                does not come in time.
        """
        chunks: list[bytes] = []
        try:
            try:
                await asyncio.wait_for(self._read(request, chunks), self._limits.read_seconds)
            except asyncio.TimeoutError:
                raise HTTPException(408, f"the body must come within {self._limits.read_seconds:g} seconds") from None
            yield b"".join(chunks)
        finally:
            self._held -= sum(map(len, chunks))

    async def _read(self, request: Request, chunks: list[bytes]) -> None:
        """Read a body chunk by chunk until its end or a limit."""
        held = 0
        async for chunk in request.stream():
            chunks.append(chunk)
            held += len(chunk)
            self._held += len(chunk)
            if held > self._limits.body_bytes:
                raise HTTPException(413, f"the body may have {self._limits.body_bytes:,} bytes")
            if self._held > self._limits.held_bytes:
                raise HTTPException(503, "too many requests wait; try again later")

    def check(self, queries: Sequence[str], k: int) -> None:
        """Refuse more queries, longer ones or more hits than a request may have. Raises HTTPException 413."""
        limits = self._limits
        if len(queries) > limits.queries:
            raise HTTPException(413, f"a request may have {limits.queries:,} queries, not {len(queries):,}")
        if len(queries) * k > limits.hits:
            raise HTTPException(
                413, f"a request may have {limits.hits:,} hits, not {len(queries):,} queries times topk={k}"
            )
        longest = max(map(len, queries), default=0)
        if longest > limits.query_chars:
            raise HTTPException(413, f"a query may have {limits.query_chars:,} characters, not {longest:,}")
