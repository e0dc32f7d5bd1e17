"""All kernels compile for every GPU they are meant for, and take no more than it has; nothing here needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from bench.resources import Resources, differences, excesses, render

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "resources.py"
FITTING = Resources(
    part="sm_90", kernel="head._sum", label="bf16 64x64", warps=4, stages=3, registers=255, spills=(0, 0),
    shared=227 * 1024, tensor_memory=0,
)  # fmt: skip


@pytest.mark.slow
def test_every_variant_compiles_and_fits() -> None:
    """Fails if a kernel does not compile, spills on sm_90 or exceeds shared memory, or RESOURCES.md is out of date."""
    if f"Made by Triton {triton.__version__} " not in SCRIPT.with_name("RESOURCES.md").read_text():
        pytest.skip("bench/RESOURCES.md was made by another Triton, whose registers are others")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)  # compiling and interpreting exclude each other
    command = [sys.executable, str(SCRIPT), "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr


def test_interpreted_kernels_are_not_compiled() -> None:
    """Fails if the script dies of something obscure inside Triton, as it would under the interpreter."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "TRITON_INTERPRET" in done.stderr


def test_excesses_are_named() -> None:
    """Fails if a limit is not looked at, or looked at on the wrong part: spills matter on sm_90 only."""
    assert list(excesses(FITTING)) == []
    assert list(excesses(replace(FITTING, spills=(8, 4)))) == ["sm_90 head._sum, bf16 64x64: spills 8/4"]
    assert list(excesses(replace(FITTING, part="sm_100", spills=(8, 4)))) == []
    for part in ("sm_80", "gfx942"):
        assert "shared memory of 227.0 KiB" in " ".join(excesses(replace(FITTING, part=part)))
    assert "tensor memory" in " ".join(excesses(replace(FITTING, part="sm_100", tensor_memory=513)))


def test_the_table_names_every_variant() -> None:
    """Fails if a new variant, or one that is gone, is not noticed; numbers may change with Triton's version."""
    other = replace(FITTING, part="sm_80", label="fp16 64x64")
    table = render([FITTING, other])
    assert differences([replace(FITTING, registers=7), other], table) == []
    assert [line.split(";")[0] for line in differences([FITTING], table)] == [
        "sm_80 head._sum fp16 64x64: only in RESOURCES.md"
    ]
    assert [line.split(";")[0] for line in differences([FITTING, other, replace(FITTING, label="new")], table)] == [
        "sm_90 head._sum new: not in RESOURCES.md"
    ]
