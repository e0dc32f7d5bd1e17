"""Run code that may hang: each call on a thread of its own, which is told to stop when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import threading
import time
from collections.abc import Callable
from functools import partial
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
        result. With `late` a cancelled call may take its time, so that nothing is lost that it has made.

        Raises:
            HangError: it took longer than `seconds`.
        """
        call = _Call(function, asyncio.get_running_loop(), late)
        call.thread = self._thread(call.run)
        call.thread.start()
        try:
            done, _ = await asyncio.wait({call.future}, timeout=seconds)
        except asyncio.CancelledError:
            self._leave(call, late)
            if late is None:
                call.stop()
            else:
                asyncio.get_running_loop().call_later(seconds, call.stop)
            raise
        if not done:
            self._leave(call, late)
            call.stop()
            raise HangError(f"no answer within {seconds:g} seconds")
        return call.future.result()

    def join(self, seconds: float) -> None:
        """Wait until the threads of calls that nobody waits for have ended, no longer than `seconds`."""
        end = time.monotonic() + seconds
        for thread in list(self._left):
            thread.join(max(0.0, end - time.monotonic()))

    def _thread(self, function: Callable[[], Any]) -> threading.Thread:
        return threading.Thread(target=function, name=self._name, daemon=True)

    def _leave(self, call: _Call, late: Callable[[Any], None] | None) -> None:
        """Take note that nobody waits for a call any more."""
        call.leave()
        assert call.thread is not None
        self._left.append(call.thread)
        if late is not None and call.made is not None:  # it was done at the same moment
            thread = self._thread(partial(late, call.made))
            self._left.append(thread)
            thread.start()


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
        self._left = False
        self.made: Any = None  # result that the loop is told of

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
            self._running, left = False, self._left
            self.made = None if left else result
        if not left:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(self._settle, result, error)
        elif self._late is not None and error is None:
            self._late(result)

    def _settle(self, result: Any, error: Exception | None) -> None:
        if self.future.done():  # it was left between the two
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)

    def leave(self) -> None:
        """Take note that nobody waits for the result."""
        self.future.cancel()
        with self._lock:
            self._left = True

    def stop(self) -> None:
        """Raise `_Stop` in the thread if the function still runs."""
        with self._lock:
            if self._running and self.thread is not None and self.thread.ident is not None:
                ident = ctypes.c_ulong(self.thread.ident)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(_Stop))
