"""Hosts on one machine: network namespaces with an address each, joined by a bridge. Needs root and `ip`."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000  # setns(2)


@dataclass(frozen=True)
class Host:
    """A network namespace and its address."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]

    def enter(self) -> None:
        """Put this thread on the host; its sockets, and the processes and threads that it starts, belong there."""
        _enter(f"/run/netns/{self.name}")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Put this thread on the host for a while. A socket or thread that it has made there stays there."""
        before = f"/proc/self/task/{threading.get_native_id()}/ns/net"
        descriptor = os.open(before, os.O_RDONLY)
        try:
            self.enter()
            yield
        finally:
            _enter(f"/proc/self/fd/{descriptor}")
            os.close(descriptor)

    def unplug(self) -> None:
        """Pull the cable: what is sent from now on is lost, and nobody is told."""
        _ip("-n", self.name, "link", "set", "eth0", "down")

    def plug_in(self) -> None:
        _ip("-n", self.name, "link", "set", "eth0", "up")


def namespaces_allowed() -> bool:
    """Whether this process may make network namespaces and interfaces in them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        with hosts(2):
            return True
    except subprocess.CalledProcessError:
        return False


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Make hosts that reach each other and nothing else; their processes are killed at the end."""
    tag = secrets.token_hex(2)
    found = [Host(f"atpo-{tag}-{i}", f"10.77.0.{i + 1}") for i in range(count)]
    switch = found[0].name
    try:
        for host in found:
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "link", "set", "lo", "up")
        _ip("link", "add", "switch", "netns", switch, "type", "bridge")
        _ip("-n", switch, "addr", "add", f"{found[0].address}/24", "dev", "switch")
        _ip("-n", switch, "link", "set", "switch", "up")
        for i, host in enumerate(found[1:], start=1):
            _ip("-n", switch, "link", "add", f"port{i}", "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _ip("-n", switch, "link", "set", f"port{i}", "master", "switch", "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.name, "link", "set", "eth0", "up")
        yield found
    finally:
        for host in found:
            kill_all(host)
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)


def kill_all(host: Host) -> None:
    """End every process of a host at once, as a power cut does."""
    listed = subprocess.run(["ip", "netns", "pids", host.name], check=False, capture_output=True, text=True)
    for pid in listed.stdout.split():
        subprocess.run(["kill", "-9", pid], check=False, capture_output=True)


def remote_shell(folder: Path) -> str:
    """Write a program that runs a line on a host, with the manners of ssh; its path."""
    path = folder / "shell"
    path.write_text('#!/bin/sh\nexec ip netns exec "$1" sh -c "$2"\n')
    path.chmod(0o755)
    return str(path)


def _enter(path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if libc.setns(descriptor, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {path}")
    finally:
        os.close(descriptor)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
