"""How long waiting OpenMP threads spin on a CPU, before they sleep and free their core (docs/performance.md#threads).

PyTorch's threads meet at the end of every parallel region. A thread that waits there spins by default for so long that
beside other work it holds the core which the thread it waits for needs.
"""

from __future__ import annotations

from collections.abc import MutableMapping

SPINNING = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
"""Rounds of GNU's runtime, and milliseconds of Intel's and LLVM's."""


def bound_spinning(environment: MutableMapping[str, str]) -> None:
    """Set the bounds in an environment, unless the user has decided about waiting threads there.

    A runtime reads its variable when it is loaded: call this before PyTorch is imported, or for a process to start.
    """
    if not any(name in environment for name in (*SPINNING, "OMP_WAIT_POLICY")):
        environment.update(SPINNING)
