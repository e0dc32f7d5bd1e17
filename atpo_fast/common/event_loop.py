"""An asyncio event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_CLOSE_SECONDS = 5.0


class EventLoopThread:
    """An event loop in a daemon thread, until it is closed or garbage-collected, or the interpreter ends."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        stopped = self.loop.create_future()
        self._thread = threading.Thread(target=_run, args=(self.loop, stopped), name=name, daemon=True)
        self._thread.start()
        self._close = weakref.finalize(self, _stop, self.loop, stopped, self._thread)

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on this thread."""
        return self._thread is threading.current_thread()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine; returns a future of its outcome."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def close(self) -> None:
        """Cancel what runs and end the thread; one that does not end within seconds is left to itself."""
        self._close()


class LazyEventLoop:
    """An event loop in a thread that is started when it is first needed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._started: EventLoopThread | None = None

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine; the future that is returned gets its result."""
        with self._lock:
            self._started = self._started or EventLoopThread(self._name)
            return self._started.submit(coroutine)

    def close(self) -> None:
        """Close the event loop if it was started."""
        with self._lock:
            started = self._started
        if started is not None:
            started.close()


async def _until(stopped: asyncio.Future[None]) -> None:
    """Wait in a main task: anyio keeps its worker threads for as long as there is one."""
    await stopped


def _run(loop: asyncio.AbstractEventLoop, stopped: asyncio.Future[None]) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(_until(stopped))
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=_CLOSE_SECONDS))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop, stopped: asyncio.Future[None], thread: threading.Thread) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(stopped.set_result, None)
    if thread is not threading.current_thread():
        thread.join(_CLOSE_SECONDS + 1)
