"""Choose the implementation of an operator.

An operator `x` that has Triton kernels launches them by the function `x_triton` of the module `atpo_kernels.x.launch`,
which takes the same arguments as the operator's PyTorch implementation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TypeVar

import torch

Result = TypeVar("Result")


def has_triton_kernel(operator: str) -> bool:
    """Say whether this build has Triton kernels for the operator; imports nothing but its package."""
    return find_spec(f"atpo_kernels.{operator}.launch") is not None


def choose(
    operator: str,
    impl: str,
    device: torch.device,
    paths: Mapping[str, Callable[..., Result]],
    dtype: torch.dtype = torch.float32,
) -> Callable[..., Result]:
    """Return the function that carries out `impl`: one of `paths`, "triton", or "auto".

    "auto" takes Triton for CUDA tensors where this build has the kernels and Triton is installed, and else
    `paths["torch"]`, which computes float64 everywhere. Raises ValueError for an unknown name or for float64 with
    "triton", and RuntimeError for Triton kernels that this build does not have, or for "triton" with CPU tensors
    outside Triton's interpreter.
    """
    if impl == "auto":
        on_gpu = device.type == "cuda" and has_triton_kernel(operator) and find_spec("triton") is not None
        impl = "triton" if on_gpu and dtype != torch.float64 else "torch"
    if impl in paths:
        return paths[impl]
    if impl != "triton":
        known = ", ".join(repr(name) for name in ("auto", "triton", *paths))
        raise ValueError(f"{operator}: impl={impl!r} is unknown; use one of {known}")
    if not has_triton_kernel(operator):
        raise RuntimeError(f"{operator}: this build has no Triton kernel for this operator; use impl='auto' or 'torch'")
    if dtype == torch.float64:
        raise ValueError(f"{operator}: Triton kernels compute in float32; float64 needs impl='auto' or 'torch'")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"{operator}: impl='triton' needs CUDA tensors; use impl='auto' or 'torch' on the CPU")
    return getattr(import_module(f"atpo_kernels.{operator}.launch"), f"{operator}_triton")
