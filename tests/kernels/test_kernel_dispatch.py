"""Choice of implementations, and import without Triton."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import atpo_kernels
from atpo_kernels.dispatch import choose
from tests.helpers.absent_packages import run_without
from tests.helpers.forked_runs import ForkedProcess, finish

OPERATORS = ("linear_logprob", "turn_policy_loss", "linear_turn_policy_loss", "tree_attention")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more operators in the package: `with_kernel` and `without_kernel`."""
    for name in ("with_kernel", "without_kernel"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "with_kernel" / "launch.py").write_text("def with_kernel_triton():\n    return 'kernel'\n")
    monkeypatch.setattr(atpo_kernels, "__path__", [*atpo_kernels.__path__, str(tmp_path)])


def test_choices_need_no_pytorch() -> None:
    """Fails if reading a configuration, whose choices are listed there, takes the seconds of importing PyTorch."""
    code = "import sys; sys.modules['torch'] = None; from atpo_kernels.choices import Aggregation, Reduction"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


FOLDERS_FIRST = """
import importlib, inspect, sys
from atpo_kernels import *
for operator in sys.argv[1:]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "atpo_kernels"]:
        del sys.modules[name]
    importlib.import_module(f"atpo_kernels.{operator}.tiles")
    exec(f"from atpo_kernels import {operator} as function")
    inspect.signature(function).parameters["impl"]
"""


def test_public_names_are_functions_and_need_no_triton() -> None:
    """Fails if a folder hides the function of its name, also where the folder is imported before the function, or if
    any module imports Triton at import time: a CPU install has none."""
    for operator in OPERATORS:
        assert inspect.isfunction(getattr(atpo_kernels, operator))
    finish(ForkedProcess(run_without, ["triton"], FOLDERS_FIRST, *OPERATORS))


def test_every_operator_has_the_same_files() -> None:
    """Fails if a reader who knows one operator's folder does not find his way in another's."""
    for operator in OPERATORS:
        folder = Path(atpo_kernels.__file__).parent / operator
        names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.name == "kernels"}
        own = {"block_lists"} if operator == "tree_attention" else set()  # what the mask leaves of its blocks
        assert names == {"__init__", "reference", "torch_impl", "kernels", "launch", "tiles"} | own, operator


@pytest.mark.parametrize("operator", OPERATORS)
def test_cpu_tensors_take_the_torch_path(operator: str) -> None:
    """Fails if "auto" looks at anything but the device: on CPU Triton would only be its slow interpreter."""
    implementations: dict[str, Any] = {"torch": len, "reference": str}
    assert choose(operator, "auto", CPU, implementations) is len


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
