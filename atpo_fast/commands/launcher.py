"""Start the processes of a run with DeepSpeed's launcher, pass signals on, and return their exit code.

This starts `deepspeed.launcher.launch`, the part of the `deepspeed` command that runs on each machine: unlike the whole
command it passes signals on and honours CUDA_VISIBLE_DEVICES. Of several machines each starts its own
(`atpo_fast/commands/nodes.py`).
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import psutil

from atpo_fast.commands.nodes import Nodes, choose_interface, tell_meeting
from atpo_fast.common.threads import bound_spinning
from atpo_fast.config import Config, ConfigError

PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True)
class Placement:
    """Device and accelerators of the processes of a run."""

    device: str
    """Kind of device: cpu or cuda."""
    accelerators: list[str]
    """Accelerator of each process: GPU ids as CUDA_VISIBLE_DEVICES writes them, or plain numbers on the CPU."""


def place(config: Config) -> Placement:
    """Choose device and processes of a run. Raises ConfigError when there are fewer GPUs than ranks."""
    gpus = [] if config.device == "cpu" else visible_gpus()
    if config.device == "cuda" and not gpus:
        raise ConfigError("device=cuda: PyTorch sees no GPU; use device=cpu or device=auto (`atpo-fast env` says more)")
    if not gpus:
        return Placement("cpu", [str(i) for i in range(max(1, config.ranks))])
    if config.ranks > len(gpus):
        raise ConfigError(f"ranks={config.ranks}: there are only {len(gpus)} GPUs; use ranks=0 for one rank per GPU")
    return Placement("cuda", gpus[: config.ranks or len(gpus)])


def visible_gpus() -> list[str]:
    """List the ids of the GPUs that PyTorch may use."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    listed = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    return (listed or [str(i) for i in range(count)])[:count]


def usable_cores() -> int:
    """Count the CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(
    verb: str,
    config_path: str,
    overrides: Sequence[str],
    placement: Placement,
    options: Sequence[str] = (),
    nodes: Nodes | None = None,
) -> int:
    """Run `atpo_fast.train` with the verb's options in every process of `placement` and wait.

    With `nodes`, these processes are those of one node, and the others start theirs by themselves.

    The first SIGINT or SIGTERM asks the processes to save and stop, the second makes them stop at once, the third kills
    them. SIGUSR1 asks them to save and stop too, however often it comes: SLURM sends it before the time limit. They are
    also stopped when this process dies. Returns 0, the exit code of the process that failed, or 128 + the signal (after
    SIGUSR1 143, with which the processes end when they have saved).
    """
    environment = _environment(placement)
    if nodes is not None:
        choose_interface(environment, nodes)
        tell_meeting(nodes)
    command = [sys.executable, "-m", "deepspeed.launcher.launch", *_meeting(placement, nodes), "--log_level=critical"]
    command += ["--module", "atpo_fast.train", "--verb", verb, *options, "--config", config_path, *overrides]
    relay = _SignalRelay(start_ranks(command, environment))
    code = relay.wait()
    if code != 0 and relay.received:
        return 128 + relay.received[0]
    killed_by = signal_of(code)
    if killed_by is None:
        return code
    print(f"error: {_killed_words(killed_by)}", file=sys.stderr, flush=True)
    return 128 + killed_by


def signal_of(code: int) -> int | None:
    """Return the signal that ended a rank, from the launcher's exit code: minus the signal, modulo 256 or not."""
    number = -code if code < 0 else 256 - code
    return number if 0 < number < signal.NSIG else None


def _killed_words(number: int) -> str:
    name = signal.Signals(number).name
    hint = " (the kernel sends it when memory runs out: see `dmesg`)" if number == signal.SIGKILL else ""
    return f"a rank was ended by {name}{hint}; the same command continues from the newest checkpoint"


def _meeting(placement: Placement, nodes: Nodes | None) -> list[str]:
    """Return the words that tell DeepSpeed's launcher its ranks, those of the other nodes, and where they meet."""
    if nodes is None:
        world = {"localhost": placement.accelerators}
        where = ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    else:
        world = {f"node{node}": [str(i) for i in range(slots)] for node, slots in enumerate(nodes.slots)}
        world[f"node{nodes.rank}"] = placement.accelerators
        where = [f"--node_rank={nodes.rank}", f"--master_addr={nodes.master}", f"--master_port={nodes.port}"]
    return [f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}", *where]


def start_ranks(command: Sequence[str], environment: Mapping[str, str]) -> Child:
    """Start DeepSpeed's launcher, the parent of the ranks.

    It gets a session of its own: Ctrl-C in a terminal reaches only this process, which passes it on once.
    """
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=prepare_child(os.getpid()))


class Child(Protocol):
    """The parent of the ranks, as a process that can be waited for."""

    pid: int

    def wait(self) -> int:
        """Wait for its end; returns the exit code."""


class _SignalRelay:
    """A relay of SIGINT, SIGTERM and SIGUSR1 to the processes of a run."""

    def __init__(self, child: Child):
        self.received: list[int] = []  # SIGINT and SIGTERM
        self._child = child

    def wait(self) -> int:
        """Wait for the launcher; returns its exit code."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, self._pass_on) for number in numbers}
        try:
            return self._child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGUSR1:
            self.received.append(number)
            # the second is another signal than the first: two of a kind may arrive as one
            number = signal.SIGTERM if len(self.received) == 1 else signal.SIGINT
        try:
            launcher = psutil.Process(self._child.pid)
            if len(self.received) > 2:
                for process in [*launcher.children(recursive=True), launcher]:
                    process.kill()
            else:  # to the ranks themselves: the launcher would kill them after 30 seconds
                for process in launcher.children() or ([launcher] if self.received else []):
                    process.send_signal(number)
        except psutil.NoSuchProcess:
            pass


def _environment(placement: Placement) -> dict[str, str]:
    """Return the environment variables of the launched processes."""
    env = dict(os.environ)
    env["DS_ACCELERATOR"] = placement.device
    # DeepSpeed finds ninja on PATH; without an activated environment it lies beside the interpreter.
    env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", os.defpath)])
    if placement.device == "cpu":
        bound_spinning(env)
        env.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // len(placement.accelerators))))
    return env


def prepare_child(parent: int) -> Callable[[], None]:
    """Return a function for the child.

    It has the kernel send the child SIGTERM when this process dies (Linux). And SIGUSR1 is ignored, by the child's own
    children too until they handle it: SLURM sends it to every process of a job.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None

    def prepare() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if libc is None:
            return
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare


def free_port() -> int:
    """Find a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
