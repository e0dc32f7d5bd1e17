"""Triton's interpreter where there is no CUDA device, so that all tests run everywhere; the CPU time of tests."""

from __future__ import annotations

import os

import pytest
import torch

from tests.helpers.cpu_time import CpuTimes

# Triton reads the variable when it is imported, so it is set before any test module is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Measure the CPU time of the tests."""
    config.pluginmanager.register(CpuTimes(), "cpu_times")
