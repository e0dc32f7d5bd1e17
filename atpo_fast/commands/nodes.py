"""Several machines: which nodes a run has, which of them this one is, and how they find each other.

Every node starts its own ranks with the same command but for `--node-rank`. SLURM and Kubernetes do that by themselves
(`configs/cluster/`); with a hostfile the first command does it through a remote shell (`commands/hostfile.py`).
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import IO

from atpo_fast.config import ConfigError

DEFAULT_PORT = 29500
STOP = "stop\n"
"""Line on the standard input of a node that has the meaning of one SIGTERM."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """The nodes of a run, seen from one of them."""

    slots: tuple[int, ...]
    """Number of ranks of each node."""
    rank: int
    """Place of this node among them."""
    master: str
    """Address of node 0, as the other nodes reach it."""
    port: int = DEFAULT_PORT
    """Port of node 0 at which the ranks meet."""

    @property
    def world(self) -> int:
        """Number of ranks of the run."""
        return sum(self.slots)


def add_node_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of runs on several machines."""
    group = parser.add_argument_group("several machines", "see docs/several_machines.md")
    group.add_argument("--nodes", metavar="N|A,B,...", help="number of nodes, or the ranks of each node")
    group.add_argument("--node-rank", type=int, metavar="R", help="place of this node, from 0")
    group.add_argument("--master", metavar="HOST[:PORT]", help=f"node 0 as the others reach it (port {DEFAULT_PORT})")
    group.add_argument("--hostfile", metavar="FILE", help="start all nodes of FILE (lines `host slots=8`) from here")
    group.add_argument(
        "--remote-shell",
        metavar="COMMAND",
        help="what runs a line on a host, as COMMAND HOST LINE (default: ssh, which must ask for no password)",
    )
    group.add_argument("--stop-with-input", action="store_true", help=argparse.SUPPRESS)


def nodes_of(arguments: argparse.Namespace, ranks: int) -> Nodes | None:
    """Return the nodes that the options describe, `ranks` of them here; None: this machine alone.

    Raises:
        ConfigError: an option is missing, or the options contradict each other.
    """
    if arguments.nodes is None:
        if arguments.node_rank is not None or arguments.master is not None:
            raise ConfigError("--node-rank and --master belong to --nodes: say how many nodes there are")
        return None
    slots = _slots(arguments.nodes, ranks)
    if arguments.node_rank is None or arguments.master is None:
        raise ConfigError(f"--nodes={arguments.nodes} needs --node-rank (which node is this?) and --master (HOST:PORT)")
    if not 0 <= arguments.node_rank < len(slots):
        raise ConfigError(f"--node-rank={arguments.node_rank}: with {len(slots)} nodes it is 0 to {len(slots) - 1}")
    if slots[arguments.node_rank] != ranks:
        raise ConfigError(
            f"--nodes={arguments.nodes} gives node {arguments.node_rank} {slots[arguments.node_rank]} ranks, "
            f"but `ranks` gives it {ranks}"
        )
    host, port = _address(arguments.master)
    return Nodes(slots, arguments.node_rank, host, port)


def choose_interface(environment: MutableMapping[str, str], nodes: Nodes) -> None:
    """Have gloo use the network interface that leads to node 0, unless the user has named one.

    Left alone, gloo takes the address of the machine's own name, which is 127.0.1.1 on many systems.

    Raises:
        ConfigError: node 0's name is not known here, or no interface leads to it.
    """
    if environment.get("GLOO_SOCKET_IFNAME"):
        return
    try:
        family, kind, _, _, address = socket.getaddrinfo(nodes.master, nodes.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing: it asks for the route
            own = probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(f"--master={nodes.master}: not reachable from node {nodes.rank} ({error})") from error
    name = _interface_of(own)
    if name is not None:
        environment["GLOO_SOCKET_IFNAME"] = name


def tell_meeting(nodes: Nodes) -> None:
    """Say, before the ranks wait for each other, where and how many."""
    print(
        f"node {nodes.rank} of {len(nodes.slots)}: {nodes.slots[nodes.rank]} of {nodes.world} ranks; "
        f"they meet at {nodes.master}:{nodes.port}",
        file=sys.stderr,
        flush=True,
    )


def follow_input(stop: Callable[[], None], stream: IO[str]) -> None:
    """Call `stop` for every line `stop` of `stream`, and once when it ends: whoever started this node is gone."""
    for line in stream:
        if line == STOP:
            stop()
    stop()


def _slots(text: str, ranks: int) -> tuple[int, ...]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    slots = tuple(numbers) if len(numbers) > 1 else (ranks,) * numbers[0]
    if not slots or min(slots) < 1:
        raise ConfigError(f"--nodes={text}: expected the number of nodes, or the ranks of each node as in 8,8,4")
    return slots


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon:
        return text, DEFAULT_PORT
    if not host or not port.isdigit():
        raise ConfigError(f"--master={text}: expected HOST or HOST:PORT")
    return host.strip("[]"), int(port)


def _interface_of(address: str) -> str | None:
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.split("%")[0] == address for found in addresses):
            return str(name)
    return None
