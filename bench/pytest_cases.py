"""The cases of `cases.py` as pytest-benchmark tests, for this machine."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from case import Case
from cases import for_device
from head_cases import CPU_RECORD
from measure import synchronize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parameters(bench: str, names: Callable[[Case], tuple[str, ...]]) -> list[Any]:
    """(case, implementation) of one kind of bench; `names` chooses the implementations of a case, or none."""
    chosen = []
    for case in for_device(DEVICE):
        if case.bench == bench:
            chosen += [pytest.param(case, name, id=f"{case.name}-{name}") for name in names(case)]
    return chosen


def of_head(case: Case) -> tuple[str, ...]:
    """Of a head operator's case all; of the large CPU shape ours and plain PyTorch, in one case each."""
    if getattr(case, "shape", None) != CPU_RECORD:
        return case.implementations
    return case.implementations[:2] if case.quick else ()


def run(benchmark: Any, case: Case, name: str, rounds: int | None = None) -> None:
    """Time one implementation; a GPU is waited for inside the timed call."""
    try:
        call = import_module(case.measured_by).makers(case, DEVICE)[name]()
    except ImportError as error:
        pytest.skip(f"{name}: {error}")

    def timed() -> None:
        call()
        synchronize(DEVICE)

    benchmark.group = case.name
    benchmark.extra_info |= {"implementation": name}
    rounds = rounds or (2 if getattr(case, "shape", None) == CPU_RECORD else 10)
    benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1)
