"""Start a run on all nodes of a DeepSpeed hostfile from one terminal, pass signals on, and wait for all of them."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from atpo_fast.commands.nodes import DEFAULT_PORT, STOP
from atpo_fast.config import ConfigError

REMOTE_SHELL = "ssh -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
_PASSED_ON = ("ATPO_", "NCCL_", "GLOO_", "UCX_", "HF_", "OMP_", "GOMP_", "KMP_", "TRITON_", "PYTHONPATH")
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")  # never on a command line, which every user of a machine can read
_GRACE_SECONDS = 60.0  # for the other nodes to notice that one has failed
_POLL_SECONDS = 0.2


def start_nodes(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Run `atpo-fast` with `words` on the nodes of `--hostfile`; returns the exit code. Raises ConfigError."""
    if arguments.nodes is not None or arguments.node_rank is not None:
        raise ConfigError("--hostfile starts all nodes itself: leave out --nodes and --node-rank")
    shell = arguments.remote_shell or REMOTE_SHELL
    return run_on_hosts(read_hostfile(arguments.hostfile), words, shell=shell, master=arguments.master)


def read_hostfile(path: str) -> dict[str, int]:
    """Read the ranks of each host from a DeepSpeed hostfile. Raises ConfigError."""
    from deepspeed.launcher.runner import fetch_hostfile

    if not Path(path).is_file():
        raise ConfigError(f"--hostfile={path}: no such file")
    try:
        hosts: dict[str, int] = fetch_hostfile(path)
    except ValueError as error:
        raise ConfigError(f"--hostfile={path}: {error}; expected lines such as `node1 slots=8`") from error
    empty = [host for host, slots in hosts.items() if slots < 1]
    if empty:
        raise ConfigError(f"--hostfile={path}: {', '.join(empty)} has no slots")
    return hosts


def run_on_hosts(hosts: Mapping[str, int], words: Sequence[str], *, shell: str, master: str | None = None) -> int:
    """Run `atpo-fast` with `words` on every host, as one run; returns the exit code of the first node that failed.

    SIGINT and SIGTERM reach every node: the first asks to save and stop, the second to stop at once. When a node fails,
    the others get a minute to notice by themselves, and are stopped then. When this process dies, all nodes stop.

    Args:
        hosts: ranks of each host; the first is node 0.
        words: verb, options, configuration and overrides.
        shell: command that runs a line on a host: `SHELL HOST LINE`.
        master: `HOST[:PORT]` of node 0; default: its name in the hostfile.
    """
    slots = ",".join(str(number) for number in hosts.values()) if len(hosts) > 1 else "1"
    meeting = master or f"{next(iter(hosts))}:{DEFAULT_PORT}"
    nodes = _RemoteNodes()
    with nodes.stopped_by_signals():
        for rank, (host, ranks) in enumerate(hosts.items()):
            place = [f"--nodes={slots}", f"--node-rank={rank}", f"--master={meeting}", "--stop-with-input"]
            nodes.start(host, shell, remote_command([*words[:1], *place, *words[1:], f"ranks={ranks}"]))
        return nodes.wait()


def remote_command(words: Sequence[str]) -> str:
    """Return a line for a remote shell: the same folder, interpreter and variables as here, then `atpo-fast WORDS`."""
    variables = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(_PASSED_ON) and not any(part in name.upper() for part in _SECRET)
    ]
    command = shlex.join(["env", *variables, sys.executable, "-m", "atpo_fast", *words])
    return f"cd {shlex.quote(os.getcwd())} && exec {command}"


class _RemoteNodes:
    """Remote shells of the nodes of a run. A line on the input of a shell stops its node, and so does its end."""

    def __init__(self) -> None:
        self._shells: dict[str, subprocess.Popen[str]] = {}
        self._stopping = False

    def start(self, host: str, shell: str, line: str) -> None:
        """Run a line on a host. The session is a new one: Ctrl-C in the terminal must not end the shell itself."""
        command = [*shlex.split(shell), host, line]
        try:
            self._shells[host] = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
        except OSError as error:
            self.stop()
            raise ConfigError(f"--remote-shell={shell}: {error}") from error

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Pass SIGINT and SIGTERM on as stops; at the end the inputs are closed."""
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for process in self._shells.values():
                with suppress(BrokenPipeError):
                    process.stdin.close()  # type: ignore[union-attr]  # it is a pipe

    def wait(self) -> int:
        """Wait for all nodes; returns the exit code of the first that failed, or 0."""
        failed: int | None = None
        deadline = float("inf")
        while any(process.poll() is None for process in self._shells.values()) or failed is None:
            ended = {host: process.returncode for host, process in self._shells.items() if process.returncode}
            if failed is None and ended:
                host, failed = max(ended.items(), key=lambda item: not 0 <= item[1] < 128)  # a signal is the cause
                deadline = time.monotonic() + _GRACE_SECONDS
                if not self._stopping:
                    print(f"{host} ended with exit code {failed}; the other nodes stop", file=sys.stderr, flush=True)
            elif all(process.returncode == 0 for process in self._shells.values()):
                return 0
            if time.monotonic() > deadline:
                deadline += _GRACE_SECONDS
                self.stop()
            time.sleep(_POLL_SECONDS)
        return failed if failed > 0 else 128 - failed

    def stop(self) -> None:
        """Ask every node that still runs to stop."""
        for process in self._shells.values():
            if process.poll() is None and process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.write(STOP)
                    process.stdin.flush()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        self.stop()
