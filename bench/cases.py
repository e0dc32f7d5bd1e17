"""Every case by name, those that must show something first, and what they must show."""

from __future__ import annotations

from bench.attention import cases as attention
from bench.attention.goals import EXPECTED as ATTENTION_EXPECTED
from bench.attention.goals import GPU as ATTENTION_GPU
from bench.core.case import Case
from bench.core.verdicts import Goals
from bench.head import cases as head
from bench.head.goals import CPU as HEAD_CPU
from bench.head.goals import EXPECTED as HEAD_EXPECTED
from bench.head.goals import GPU as HEAD_GPU
from bench.packing.cases import HOST
from bench.packing.report import CPU as PACKING_CPU
from bench.packing.report import GPU as PACKING_GPU
from bench.update import cases as update
from bench.update.goals import CPU as UPDATE_CPU
from bench.update.goals import EXPECTED as UPDATE_EXPECTED
from bench.update.goals import GPU as UPDATE_GPU

GPU_GOALS: Goals = HEAD_GPU | ATTENTION_GPU | UPDATE_GPU | PACKING_GPU
EXPECTED = HEAD_EXPECTED | ATTENTION_EXPECTED | UPDATE_EXPECTED
CPU_GOALS: Goals = HEAD_CPU | UPDATE_CPU | PACKING_CPU


def for_device(kind: str) -> list[Case]:
    """List the cases of "cuda" or "cpu" in the order in which they are run; the first of every name."""
    found: list[Case] = [*head.for_device(kind), HOST, *attention.for_device(kind), *update.for_device(kind)]
    by_name: dict[str, Case] = {}
    for case in sorted(found, key=lambda case: not case.quick):
        by_name.setdefault(case.name, case)
    return list(by_name.values())
