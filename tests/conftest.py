"""Triton's interpreter where there is no CUDA device, so that all tests run everywhere; the CPU time of tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from atpo_fast.common.threads import bound_spinning
from tests.helpers.cpu_time import CpuTimes

# Before PyTorch loads its runtime. The models of tests are tiny: a second thread would wait, and spin meanwhile.
bound_spinning(os.environ)
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch  # noqa: E402

# Triton reads the variable when it is imported, so it is set before any test module is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def second_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the second device of `ATPO_TEST_DEVICE=meta` while a test runs."""
    from tests.helpers import devices, second_device

    if devices.DEVICE != second_device.DEVICE:
        yield
        return
    monkeypatch.setattr(torch, "autocast", second_device.Autocast)
    with second_device.SecondDevice():
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Measure the CPU time of the tests."""
    config.pluginmanager.register(CpuTimes(), "cpu_times")
