"""Choice of implementations, and import without Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import atpo_kernels
from atpo_kernels.dispatch import choose

OPERATORS = ("linear_logprob", "turn_policy_loss", "linear_turn_policy_loss", "tree_attention")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more operators in the package: `with_kernel` and `without_kernel`."""
    for name in ("with_kernel", "without_kernel"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "with_kernel" / "triton.py").write_text("def with_kernel():\n    return 'kernel'\n")
    monkeypatch.setattr(atpo_kernels, "__path__", [*atpo_kernels.__path__, str(tmp_path)])


def test_importing_needs_no_triton() -> None:
    """Fails if any module imports Triton at import time: a CPU install has none."""
    code = "import sys; sys.modules['triton'] = None; import atpo_kernels"  # importing triton now raises
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_public_names_are_functions() -> None:
    """Fails if a sub-package hides the function of the same name."""
    assert all(callable(getattr(atpo_kernels, name)) for name in OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_cpu_tensors_take_the_torch_path(operator: str) -> None:
    """Fails if "auto" looks at anything but the device: on CPU Triton would only be its slow interpreter."""
    assert choose(operator, "auto", CPU, {"torch": len, "reference": str}) is len


@pytest.mark.usefixtures("operators")
def test_cuda_tensors_take_the_kernel_where_there_is_one() -> None:
    """Fails if a kernel that is dropped into an operator's folder is not found, or is demanded where there is none."""
    pytest.importorskip("triton")
    assert choose("with_kernel", "auto", CUDA, {"torch": len})() == "kernel"
    assert choose("without_kernel", "auto", CUDA, {"torch": len}) is len


@pytest.mark.usefixtures("operators")
def test_a_missing_kernel_is_an_error_that_names_the_operator() -> None:
    """Fails if impl="triton" silently falls back, or dies in an ImportError."""
    assert choose("with_kernel", "triton", CUDA, {"torch": len})() == "kernel"
    with pytest.raises(RuntimeError, match="without_kernel: this build has no Triton kernel"):
        choose("without_kernel", "triton", CUDA, {"torch": len})


@pytest.mark.usefixtures("operators")
def test_kernels_are_for_floats_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if float64 is silently computed in float32, or CPU tensors reach a compiled kernel."""
    pytest.importorskip("triton")
    assert choose("with_kernel", "auto", CUDA, {"torch": len}, torch.float64) is len
    with pytest.raises(ValueError, match="float64 needs impl='auto' or 'torch'"):
        choose("with_kernel", "triton", CUDA, {"torch": len}, torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("with_kernel", "triton", CPU, {"torch": len})() == "kernel"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="needs CUDA tensors"):
        choose("with_kernel", "triton", CPU, {"torch": len})


def test_unknown_implementations_are_refused() -> None:
    """Fails if a misspelt impl is taken for the default."""
    with pytest.raises(ValueError, match=r"impl='tortch'.*'torch'"):
        choose("linear_logprob", "tortch", CPU, {"torch": len})
