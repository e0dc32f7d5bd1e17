"""What the host does before a batch's first forward: packing, and the attention's block lists of every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.core.case import Case

TREES, MAX_TOKENS, VOCAB = 64, 65536, 150_000
TARGET, GROUP, KEY_HEADS, WIDTH = "sm_90", 4, 8, 128  # of a Qwen3-4B on an H100 or H200


@dataclass(frozen=True, kw_only=True)
class HostCase(Case):
    """64 trees of 22 trajectories of 3,000 tokens, on one core of any machine."""

    measured_by: ClassVar[str] = "bench.packing.measure"

    def small(self) -> HostCase:
        """Return the case as it is: it runs on any machine."""
        return self

    @property
    def bench(self) -> str:
        """Kind of the case's records, of which this is the only case."""
        return "host_preparation"

    @property
    def name(self) -> str:
        """Name of the case: trees, leaves, tokens of a trajectory."""
        return f"host_preparation-{TREES}x22x3000"


HOST = HostCase(quick=True)
