"""Commands and their ranks as forks of one process that has imported everything.

Starting `python -m atpo_fast train` imports PyTorch, transformers and DeepSpeed in the launcher and in every rank. That
costs more than a tiny run. Here the command is a fork, and so are the ranks that it starts: `_launcher` stands in for
DeepSpeed's launcher; all else is the program's own. Tests of the real start use `runs.launch`.
"""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import FrameType
from typing import Any

from tests.helpers.network import Host

ROOT = Path(__file__).resolve().parents[2]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.helpers.forked_imports"])
FORK = multiprocessing.get_context("fork")
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that tell a rank its place in the group."""


@dataclass(frozen=True)
class Group:
    """The ranks of one node, and the run that they belong to."""

    ranks: int
    first: int
    """Number of their first in the run."""
    world: int
    """Number of ranks of the run."""
    address: str
    port: int

    @classmethod
    def alone(cls, ranks: int) -> Group:
        """Make the group of all ranks of a run on this machine, with a port of its own."""
        from atpo_fast.commands.launcher import free_port

        return cls(ranks, 0, ranks, "127.0.0.1", free_port())

    @classmethod
    def of_launcher(cls, words: Sequence[str]) -> Group:
        """Read the options of DeepSpeed's launcher."""
        given = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
        nodes = [len(slots) for slots in json.loads(base64.urlsafe_b64decode(given["world_info"])).values()]
        rank = int(given.get("node_rank", 0))
        return cls(nodes[rank], sum(nodes[:rank]), sum(nodes), given["master_addr"], int(given["master_port"]))


class ForkedProcess:
    """A function in a fork, with the manners of `subprocess.Popen`; its output goes to a file."""

    def __init__(
        self, function: Callable[..., int], *arguments: Any, limit_bytes: int | None = None, output: Path | None = None
    ):
        self._file = tempfile.NamedTemporaryFile("r", prefix="forked-")  # noqa: SIM115  # lives as long as this
        self._output = output or Path(self._file.name)
        self._output.touch()
        self._process = SERVER.Process(target=_call, args=(function, arguments, str(self._output), limit_bytes))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """Exit code; minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    @property
    def pid(self) -> int:
        """Id of the process of the command."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Wait for the end; returns the output. Raises TimeoutError."""
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise TimeoutError(f"still running after {timeout} s:\n{self._output.read_text()[-3000:]}")
        return self._output.read_text(), None


def finish(process: ForkedProcess | subprocess.Popen[str], code: int = 0) -> str:
    """Wait for the end of a process and expect its exit code; its output."""
    output, _ = process.communicate(timeout=900)
    assert process.returncode == code, output[-4000:]
    return output


def start_command(
    *words: str, limit_bytes: int | None = None, output: Path | None = None, host: Host | None = None
) -> ForkedProcess:
    """`atpo-fast` with some words, its ranks as forks of it; on a host of its own if one is given."""
    return ForkedProcess(_command, words, host, limit_bytes=limit_bytes, output=output)


def run_tests(arguments: list[str], environment: Mapping[str, str]) -> int:
    """Do what `pytest` does under more variables; for a `ForkedProcess`, in which no test or helper has read them."""
    import pytest

    assert "tests.helpers.devices" not in sys.modules
    os.environ |= environment
    return pytest.main(arguments)


def fork_ranks(function: Callable[..., object], ranks: int, *arguments: Any) -> None:
    """Call a function in every rank of a process group on the CPU; fails if one does."""
    finish(ForkedProcess(run_group, function, arguments, Group.alone(ranks)))


def _call(function: Callable[..., int], arguments: Sequence[Any], output: str, limit_bytes: int | None) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.chdir(ROOT)
    if limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    sys.exit(function(*arguments))


def _command(words: Sequence[str], host: Host | None) -> int:
    from atpo_fast.commands import cli, launcher

    if host is not None:
        host.enter()
    launcher.start_ranks = _start_ranks  # type: ignore[assignment]  # what it returns has the two attributes that are used
    return cli.main(list(words))


class ForkedStart:
    """What stands in for the process that `launcher.start_ranks` returns: a fork that calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: Any):
        self._process = FORK.Process(target=function, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def _start_ranks(command: Sequence[str], environment: Mapping[str, str]) -> ForkedStart:
    """Start the parent of the ranks in the place of DeepSpeed's launcher."""
    from atpo_fast.commands.launcher import prepare_child

    module = command.index("atpo_fast.train")
    ranks = command[module + 1 :], dict(environment)
    return ForkedStart(_launcher, _rank, ranks, Group.of_launcher(command[:module]), prepare_child(os.getpid()))


def run_group(function: Callable[..., object], arguments: Sequence[Any], group: Group) -> int:
    """Call a function in every rank of a group on this node and wait; ends this process if one fails."""
    _launcher(function, arguments, group)
    return 0


def _launcher(
    function: Callable[..., object], arguments: Sequence[Any], group: Group, before: Callable[[], None] | None = None
) -> None:
    """Fork the ranks and wait; the first that fails ends the others, and its code is the code of this process."""
    if before is not None:
        os.setsid()
        before()
    running: dict[Any, ForkProcess] = {}
    for rank in range(group.ranks):
        process = FORK.Process(target=_in_group, args=(function, arguments, rank, group))
        process.start()
        running[process.sentinel] = process

    def stop(number: int, frame: FrameType | None) -> None:
        for process in running.values():
            process.terminate()

    signal.signal(signal.SIGTERM, stop)
    failed = 0
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode and not failed:
                failed = process.exitcode
                stop(signal.SIGTERM, None)
    if failed:
        sys.exit(failed)


def _in_group(function: Callable[..., object], arguments: Sequence[Any], rank: int, group: Group) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    place = (group.first + rank, rank, group.world, group.ranks, group.address, group.port)
    os.environ |= dict(zip(PLACE, map(str, place), strict=True))
    code = function(*arguments)
    sys.exit(code if isinstance(code, int) else 0)


def _rank(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Be one process of a run, as `python -m atpo_fast.train` is."""
    from atpo_fast.train.__main__ import main

    place = {name: os.environ[name] for name in PLACE}
    os.environ.clear()
    os.environ |= {**environment, **place}
    sys.argv = ["atpo_fast.train", f"--local_rank={place['LOCAL_RANK']}", *words]
    return main()
