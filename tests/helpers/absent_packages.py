"""An interpreter in which packages are not installed and nothing of ours was imported yet, for a `ForkedProcess`.

It is a fork, in which other packages are imported already. An interpreter of its own would import PyTorch first.
"""

from __future__ import annotations

import sys
from collections.abc import Collection

OURS = ("atpo_kernels", "atpo_fast", "bench")


def run_without(absent: Collection[str], code: str, *arguments: str) -> int:
    """Run code where some packages are absent, and nothing of ours has been imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] in {*OURS, *absent}]:
        del sys.modules[name]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it now raises
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    return 0
