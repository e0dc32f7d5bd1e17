"""The python tool: runs code in a fresh interpreter process.

The process is separate and limited in time and output; it is not a sandbox against hostile code.
"""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import subprocess
import sys
import threading
from typing import IO

_CHUNK = 65536


class PythonTool:
    """Runs an argument as Python code and answers with what it prints.

    As in a notebook, a bare expression on the last line is printed (None is not). The answer is stdout when the code
    succeeds, else the end of stderr. Code that takes longer than `timeout_seconds` is killed with its children.
    """

    name = "python"

    def __init__(self, *, timeout_seconds: float = 120.0, max_chars: int = 20_000) -> None:
        self.timeout_seconds = timeout_seconds
        self.max_chars = max_chars

    def __call__(self, argument: str) -> str:
        """Run code; never raises for what the code does."""
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", print_last_expression(argument)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:  # too long for a command line, or a null byte in it
            return f"The code could not be started: {error}"
        assert process.stdout is not None and process.stderr is not None
        stdout, stderr = _Reader(process.stdout, self.max_chars), _Reader(process.stderr, self.max_chars)
        try:
            status = process.wait(self.timeout_seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _kill_group(process)
        if status is None:
            return f"TimeoutError: the code ran longer than {self.timeout_seconds:g} seconds."
        if status == 0:
            return stdout.text()[: self.max_chars].strip()
        return stderr.text()[-self.max_chars :].strip() or f"The code ended with status {status}."


class _Reader:
    """Drains a pipe in the background and keeps its first and last `limit` bytes, so that memory stays bounded."""

    def __init__(self, pipe: IO[bytes], limit: int) -> None:
        self._pipe = pipe
        self._limit = limit
        self._head = b""
        self._tail = b""
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        with self._pipe:
            while chunk := os.read(self._pipe.fileno(), _CHUNK):
                space = max(0, self._limit - len(self._head))
                self._head += chunk[:space]
                self._tail = (self._tail + chunk[space:])[-self._limit :]

    def text(self) -> str:
        """What was read once the pipe closed (a second of grace)."""
        self._thread.join(1.0)
        return (self._head + self._tail).decode("utf-8", errors="replace")


def print_last_expression(code: str) -> str:
    """The code with a bare expression at its end wrapped so that its value is printed unless it is None.

    Code that does not parse is returned as it is: the interpreter then reports the error.
    """
    try:
        module = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code
    if not module.body or not isinstance(module.body[-1], ast.Expr):
        return code
    last = ast.unparse(module.body.pop())
    shown = f"_last = (\n{last}\n)\nif _last is not None:\n    print(_last)"
    return f"{ast.unparse(module)}\n{shown}"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and every child it left behind, and reap it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all gone already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
