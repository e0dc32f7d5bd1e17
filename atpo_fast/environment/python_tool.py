"""The python tool: run code in a fresh, confined interpreter process (see `sandbox/`)."""

from __future__ import annotations

import ast
import contextlib
import logging
import marshal
import math
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import IO, ClassVar

from atpo_fast.environment import bubblewrap
from atpo_fast.environment.function_tool import ToolError
from atpo_fast.environment.sandbox import main as sandbox

_LOG = logging.getLogger(__name__)
_FOLDER = Path(sandbox.__file__).parents[1]
# Importing it above has left compiled code for the starts.
_START = f"import sys; sys.path.insert(0, {str(_FOLDER)!r}); from sandbox.main import main; del sys.path[0]; main()"
_FENCE = re.compile(r"\s*(?:```+|~~~+)[ \t]*(?:python3?|py3?)?[ \t]*\n", re.IGNORECASE)
_FENCE_END = re.compile(r"\n[ \t]*(?:```+|~~~+)\s*\Z")
_CHUNK = 65536
_MAX_CODE_BYTES = 1 << 20
_MAX_OUTPUT_BYTES = 16 << 20  # code that writes more is stopped
_GRACE_SECONDS = 5.0  # for the sandbox to end all processes itself when it is told to


@dataclass(slots=True)
class _Output:
    """The output of the code on one pipe: the first and the last `limit` bytes, and how many in all."""

    limit: int
    head: bytes = b""
    tail: bytes = b""
    total: int = 0

    def add(self, chunk: bytes) -> None:
        space = max(0, self.limit - len(self.head))
        self.head += chunk[:space]
        self.tail = (self.tail + chunk[space:])[-self.limit :]
        self.total += len(chunk)

    def text(self) -> str:
        return (self.head + self.tail).decode("utf-8", errors="replace")


@dataclass(slots=True)
class _Run:
    """The end of a run: `status` is None when it was stopped, and `why` then says why."""

    limit: int
    status: int | None = None
    why: str = ""
    stdout: _Output = field(init=False)
    stderr: _Output = field(init=False)
    report: _Output = field(init=False)

    def __post_init__(self) -> None:
        self.stdout, self.stderr, self.report = (_Output(self.limit) for _ in range(3))


HOW_TO_CONFINE = (
    "Allow unprivileged user namespaces, start the container with the capability SYS_ADMIN, or install a bubblewrap "
    "that may make them"
)


@dataclass(frozen=True, slots=True)
class Confinement:
    """How calls of the python tool are confined on this system.

    Attributes:
        how: by facility (processes, files, memory, user, network), what was obtained.
        weak: facilities of them that are less than they should be.
    """

    how: dict[str, str]
    weak: tuple[str, ...]

    @classmethod
    def read(cls, report: bytes) -> Confinement:
        """Read the sandbox's report."""
        found: dict[str, tuple[str, bool]] = ast.literal_eval(report.decode())
        return cls({name: how for name, (how, _) in found.items()}, tuple(n for n, (_, ok) in found.items() if not ok))

    def described(self, names: Iterable[str] | None = None) -> str:
        """Return facilities in words; none: all of them."""
        return "; ".join(f"{name}: {self.how[name]}" for name in (self.how if names is None else names))


class PythonTool:
    """The tool that runs its argument as Python code and answers with what the code prints.

    A Markdown fence around the code is removed. As in a notebook, a bare expression on the last line is printed (None
    is not). The answer is stdout when the code succeeds, else the end of stderr. Each call has its own process, working
    directory and clean environment; no network and no sockets; and of the files it sees Python and the system's
    programs only, as far as the system allows: what does not hold is logged once as a warning. When the call is
    answered, no process and no file of it is left.

    Args:
        timeout_seconds: longest time of a call; then all its processes are killed.
        max_chars: number of characters to which an answer is cut.
        memory_mb: address space of each process, and memory of all of them together.
        processes: processes and threads that one call may have.
        file_mb: size of its largest file, and of its working directory where that is in memory.
    """

    # The memory of a working directory, and of /dev/shm, comes on top of `memory_mb`.

    name = "python"
    description = "Runs Python code in a fresh interpreter without network. Answers with what the code prints."
    parameters: ClassVar = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}

    def __init__(
        self,
        *,
        timeout_seconds: float = 120.0,
        max_chars: int = 20_000,
        memory_mb: int = 2048,
        processes: int = 64,
        file_mb: int = 64,
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self.max_chars = max_chars
        self.memory_mb = memory_mb
        self.processes = processes
        self.file_mb = file_mb
        self._logged = b""
        self._lock = threading.Lock()

    def __call__(self, argument: str) -> str:
        """Run code.

        Raises:
            ToolError: code that is too long, or that printed nothing.
            OSError: no process could be started.
        """
        workdir = tempfile.mkdtemp(prefix="atpo_python_")
        try:
            run = self._run(self._job(bare_code(argument), workdir), workdir)
        finally:
            shutil.rmtree(workdir, ignore_errors=True)
        self._log_facilities(run.report.head)
        if run.status is None:
            return run.why
        if run.status:
            errors = run.stderr.text()[-self.max_chars :].strip()
            return errors or f"The code ended with {_describe_status(run.status)}."
        answer = run.stdout.text()[: self.max_chars].strip()
        if not answer:
            raise ToolError("Tool(python) returned empty output.")  # as it would again
        return answer

    def _run(self, job_text: bytes, workdir: str) -> _Run:
        """Start the sandbox, gather its output until it ends or has to be stopped."""
        with contextlib.ExitStack() as files:
            job = files.enter_context(tempfile.TemporaryFile())
            job.write(job_text)
            job.seek(0)
            reading, writing = os.pipe()
            readable = files.enter_context(os.fdopen(reading, "rb"))
            writable = files.enter_context(os.fdopen(writing, "wb"))
            command = [sys.executable, "-I", "-B", "-X", "utf8", "-c", _START, str(writable.fileno())]
            if bubblewrap.is_needed_and_works():
                command = bubblewrap.confine(command, workdir=workdir, file_mb=self.file_mb)
            process = subprocess.Popen(
                command,
                stdin=job,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[writable.fileno()],
                start_new_session=True,
                cwd=workdir,
                env=_environment(workdir),
            )
            writable.close()
            assert process.stdout is not None and process.stderr is not None
            files.enter_context(process.stdout)
            files.enter_context(process.stderr)
            run = _Run(self.max_chars)
            try:
                self._gather(
                    process, {process.stdout: run.stdout, process.stderr: run.stderr, readable: run.report}, run
                )
            finally:
                _end(process)
            if not run.why:
                run.status = process.returncode
            return run

    def _gather(self, process: subprocess.Popen[bytes], pipes: dict[IO[bytes], _Output], run: _Run) -> None:
        """Read all pipes to their ends; sets `run.why` when time or output ran out first."""
        deadline = time.monotonic() + self.timeout_seconds
        with selectors.DefaultSelector() as selector:
            for pipe, output in pipes.items():
                selector.register(pipe, selectors.EVENT_READ, output)
            while selector.get_map():
                ready = selector.select(min(0.1, max(0.0, deadline - time.monotonic())))
                for key, _ in ready:
                    chunk = os.read(key.fd, _CHUNK)
                    key.data.add(chunk)
                    if not chunk:
                        selector.unregister(key.fileobj)
                if run.stdout.total + run.stderr.total > _MAX_OUTPUT_BYTES:
                    run.why = f"{run.stdout.text()[: self.max_chars]}\nThe code was stopped: it printed too much."
                    return
                if time.monotonic() >= deadline:
                    run.why = f"TimeoutError: the code ran longer than {self.timeout_seconds:g} seconds."
                    return
                if not ready and process.poll() is not None:
                    return  # something that escaped holds the pipes
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                run.why = f"TimeoutError: the code ran longer than {self.timeout_seconds:g} seconds."

    def _job(self, code: str, workdir: str) -> bytes:
        job = {
            "code": code,
            "workdir": workdir,
            "parent": os.getpid(),
            "bubblewrap": bubblewrap.is_needed_and_works(),
            "memory_mb": self.memory_mb,
            "processes": self.processes,
            "file_mb": self.file_mb,
            "cpu_seconds": math.ceil(self.timeout_seconds) + 1,
        }
        text = marshal.dumps(job)
        if len(text) > _MAX_CODE_BYTES:
            raise ToolError(f"Tool(python) was not called: {len(code):,} characters of code are too many.")
        return text

    def confinement(self) -> Confinement:
        """Find out how calls are confined here, by a call.

        Raises:
            OSError: no process could be started.
        """
        workdir = tempfile.mkdtemp(prefix="atpo_python_")
        try:
            run = self._run(self._job("", workdir), workdir)
        finally:
            shutil.rmtree(workdir, ignore_errors=True)
        self._log_facilities(run.report.head)
        if not run.report.head:
            raise OSError(f"the python tool cannot start: {run.why or run.stderr.text().strip()[-300:]}")
        return Confinement.read(run.report.head)

    def _log_facilities(self, report: bytes) -> None:
        """Log how calls are confined, at the first call and when it changes."""
        with self._lock:
            if not report or report == self._logged:
                return
            self._logged = report
        found = Confinement.read(report)
        _LOG.info("python tool: %s", found.described())
        if found.weak:
            _LOG.warning(
                "PYTHON TOOL NOT FULLY CONFINED (%s). %s, or set tools.python_confinement=require to refuse to run",
                found.described(found.weak),
                HOW_TO_CONFINE,
            )


def _environment(workdir: str) -> dict[str, str]:
    """Return an environment with nothing of the trainer's, which may hold secrets, but the library path of Python."""
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": workdir,
        "TMPDIR": workdir,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment


def bare_code(text: str) -> str:
    """Return code without the Markdown fence around it, which may not be closed, and without shared indentation."""
    match = _FENCE.match(text)
    return dedent(text if match is None else _FENCE_END.sub("", text[match.end() :]))


def _describe_status(status: int) -> str:
    """Describe an exit status in words: `status 3` or `signal SIGSEGV`."""
    number = status - 128 if status > 128 else -status
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(number).name}"
    return f"status {status}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the sandbox and every process in it, and reap it."""
    if process.poll() is None:
        process.terminate()  # it then ends all processes of the code itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all gone already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
