"""Calls of sessions, plain or async, for tests of the adapters to other projects' environments."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from atpo_fast.environment.session import Result, Session


class Caller:
    """Calls methods of sessions on one event loop, as a run does."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def __call__(self, value: Any) -> Any:
        """Return a value, or what it gives when it is awaited."""
        return self._loop.run_until_complete(_awaited(value)) if inspect.isawaitable(value) else value

    def steps(self, session: Session, *texts: str) -> list[Result]:
        """Act by plain text, several times."""
        return [self(session.step(text)) for text in texts]

    def calls(self, session: Session, *calls: tuple[str, dict[str, Any]]) -> list[Result]:
        """Call tools one after the other."""
        return [self(session.call(name, arguments)) for name, arguments in calls]

    def close(self) -> None:
        """End the loop."""
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


@contextmanager
def caller() -> Iterator[Caller]:
    """Yield a `Caller` that is closed afterwards."""
    one = Caller()
    try:
        yield one
    finally:
        one.close()


async def _awaited(value: Any) -> Any:
    return await value
