"""The cases of this machine as pytest-benchmark tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.cases import for_device
from bench.core.case import Case
from bench.core.measure import synchronize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parameters(benches: tuple[str, ...], choose: Callable[[Any], tuple[str, ...]]) -> list[Any]:
    """List (case, implementation) of some kinds of bench; `choose` names the implementations of a case, or none."""
    return [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in for_device(DEVICE)
        if case.bench in benches
        for name in choose(case)
    ]


def run(benchmark: Any, case: Case, name: str, rounds: int) -> None:
    """Time one implementation; a GPU is waited for inside the timed call."""
    try:
        call = case.makers(DEVICE)[name]()
    except ImportError as error:
        pytest.skip(f"{name}: {error}")

    def timed() -> None:
        call()
        synchronize(DEVICE)

    benchmark.group = case.name
    benchmark.extra_info |= {"implementation": name}
    benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1)
