"""`python -m atpo_kernels.hosts`: the hosts that are installed, and whether their adapters fit them."""

from __future__ import annotations

import sys

from atpo_kernels.hosts.check import check_hosts


def main() -> int:
    """Print a line for each installed host; returns 1 if an adapter does not fit."""
    found = check_hosts()
    for host in found:
        print(f"{host.name} {host.version} (tested: {host.tested}): {host.fault or 'fits'}")
    if not found:
        print("none of the hosts is installed")
    return int(any(host.fault for host in found))


if __name__ == "__main__":
    sys.exit(main())
