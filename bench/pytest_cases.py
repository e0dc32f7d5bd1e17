"""The cases of `cases.py` as pytest-benchmark tests, for this machine."""

from __future__ import annotations

from typing import Any

import calls as head_calls
import pytest
import torch
import turn_losses
from cases import CPU_RECORD, Case, Operator, for_device
from measure import synchronize
from problems import make_problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parameters(operator: Operator) -> list[Any]:
    """(case, implementation) of one operator; the large CPU shape with plain PyTorch alone, in one case each."""
    chosen = []
    for case in for_device(DEVICE):
        large = case.shape == CPU_RECORD
        if case.operator == operator and (case.quick or not large):
            names = case.implementations[:2] if large else case.implementations
            chosen += [pytest.param(case, name, id=f"{case.name}-{name}") for name in names]
    return chosen


def run(benchmark: Any, case: Case, name: str) -> None:
    """Time one implementation; a GPU is waited for inside the timed call."""
    try:
        if case.operator == "turn_policy_loss":
            call: Any = turn_losses.make_call(name, turn_losses.make_log_probs(case, DEVICE))
        else:
            call = head_calls.make_call(name, case, make_problem(case, DEVICE))
    except ImportError as error:
        pytest.skip(f"{name}: {error}")

    def timed() -> None:
        call()
        synchronize(DEVICE)

    benchmark.group = case.name
    benchmark.extra_info |= {"implementation": name, "shape": list(case.shape)}
    benchmark.pedantic(timed, rounds=2 if case.shape == CPU_RECORD else 10, warmup_rounds=1)
