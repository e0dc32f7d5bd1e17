"""Hosts on one machine: network namespaces with an address each, joined by a bridge. Needs root and `ip`."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    """A network namespace and its address."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]


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


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
