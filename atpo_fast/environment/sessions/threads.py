"""Run code that may hang: each call on a thread of its own, which is told to stop when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import Any


class HangError(Exception):
    """A call that gave no answer within its time."""


class _Stop(BaseException):
    """Raised in a thread whose call nobody waits for."""


class Threads:
    """Runs calls, each on a new daemon thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._left: list[threading.Thread] = []

    @property
    def hung(self) -> int:
        """Number of threads whose call nobody waits for, and that have not ended."""
        self._left = [thread for thread in self._left if thread.is_alive()]
        return len(self._left)

    async def run(self, function: Callable[[], Any], seconds: float, late: Callable[[Any], None] | None = None) -> Any:
        """Run a function and return what it returns; on an event loop.

        Where it takes too long, or where the task is cancelled, a `_Stop` is raised in its thread. That ends Python
        code, and code that waits as soon as it returns to Python. Should it return all the same, `late` gets its
        result.

        Raises:
            HangError: it took longer than `seconds`.
        """
        call = _Call(function, asyncio.get_running_loop(), late)
        call.thread = threading.Thread(target=call.run, name=self._name, daemon=True)
        call.thread.start()
        try:
            done, _ = await asyncio.wait({call.future}, timeout=seconds)
        except asyncio.CancelledError:
            self._stop(call)
            raise
        if not done:
            self._stop(call)
            raise HangError(f"no answer within {seconds:g} seconds")
        return call.future.result()

    def _stop(self, call: _Call) -> None:
        call.future.cancel()
        call.stop()
        assert call.thread is not None
        self._left.append(call.thread)


class _Call:
    """A function that runs on a thread, and the future of its result."""

    def __init__(
        self, function: Callable[[], Any], loop: asyncio.AbstractEventLoop, late: Callable[[Any], None] | None
    ) -> None:
        self._function, self._loop, self._late = function, loop, late
        self.future: asyncio.Future[Any] = loop.create_future()
        self.thread: threading.Thread | None = None
        self._lock = threading.Lock()  # of the following two
        self._running = True
        self._stopped = False

    def run(self) -> None:
        """Call the function, on the thread."""
        with contextlib.suppress(_Stop):
            result, error = None, None
            try:
                result = self._function()
            except _Stop:
                return
            except BaseException as raised:  # also sys.exit, which must not end a thread without a word
                error = raised if isinstance(raised, Exception) else RuntimeError(f"{type(raised).__name__}: {raised}")
            self._finish(result, error)

    def _finish(self, result: Any, error: Exception | None) -> None:
        with self._lock:
            self._running, stopped = False, self._stopped
        if not stopped:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(self._settle, result, error)
        elif self._late is not None and error is None:
            self._late(result)

    def _settle(self, result: Any, error: Exception | None) -> None:
        if self.future.done():  # it was given up between the two
            if self._late is not None and error is None:
                threading.Thread(target=self._late, args=(result,), daemon=True).start()
        elif error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)

    def stop(self) -> None:
        """Raise `_Stop` in the thread if the function still runs."""
        with self._lock:
            self._stopped = True
            if self._running and self.thread is not None and self.thread.ident is not None:
                ident = ctypes.c_ulong(self.thread.ident)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(_Stop))
