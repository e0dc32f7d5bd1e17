"""Wait for what has to become true."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence

from tests.helpers.forked_runs import ForkedProcess

Node = ForkedProcess | subprocess.Popen[str]


def wait_for(condition: Callable[[], bool], nodes: Sequence[Node] = (), seconds: float = 900.0) -> None:
    """Wait until something holds; fails when a node ends before, and after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        for node in nodes:
            assert node.poll() is None, node.communicate(timeout=1)[0][-3000:]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
