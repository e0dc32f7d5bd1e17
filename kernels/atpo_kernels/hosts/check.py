"""Whether the adapters fit the hosts that are installed here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

TESTED = {
    "trl": "1.16.0",
    "verl": "0.9.1",
    "skyrl": "0.3.0",
    "openrlhf": "0.11.2",
}
"""Hosts on PyPI, by their distribution, and the version that the adapter was tested with."""
REGISTERED = ("verl", "skyrl")
"""Hosts that find the adapter in a registry; verl keeps a failure to register to itself."""


@dataclass(frozen=True, slots=True)
class Host:
    """A host that is installed, and what its adapter lacks."""

    name: str
    version: str
    tested: str
    fault: str | None
    """Why the adapter does not fit, in one line; None where it does."""


def check_hosts(names: Iterable[str] = TESTED) -> list[Host]:
    """Run `check` of each installed host's adapter, in a process of its own: hosts are slow and loud to import."""
    found = [(name, installed) for name in names if (installed := _version(name)) is not None]
    return [Host(name, installed, TESTED[name], _fault(name)) for name, installed in found]


def _fault(name: str) -> str | None:
    code = f"from atpo_kernels.hosts.{name} import check; check()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else lines[-1] if lines else f"exit code {done.returncode}"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
