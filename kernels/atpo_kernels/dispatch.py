"""Choice of the implementation of an operator.

The Triton kernel of operator `x`, where this build has one, is the function `x` of the module `atpo_kernels.x.triton`,
with the signature of the operator's PyTorch path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def has_triton_kernel(operator: str) -> bool:
    """Whether this build has a Triton kernel for the operator; imports nothing but its package."""
    return find_spec(f"atpo_kernels.{operator}.triton") is not None


@contextmanager
def kernel_context(tensor: Tensor) -> Iterator[None]:
    """Autocast is off, for operators that choose their own precision, and the tensor's GPU is the current one."""
    with torch.autocast(tensor.device.type, enabled=False), torch.cuda.device_of(tensor):
        yield


def choose(
    operator: str,
    impl: str,
    device: torch.device,
    paths: Mapping[str, Callable[..., Result]],
    dtype: torch.dtype = torch.float32,
) -> Callable[..., Result]:
    """The function that carries out `impl`: one of `paths`, "triton", or "auto".

    "auto" is Triton for CUDA tensors where this build has the kernel and Triton is installed, else `paths["torch"]`, as
    for float64 everywhere. Raises ValueError for an unknown name or for float64 with "triton", and RuntimeError for a
    Triton kernel that this build does not have, or for CPU tensors with "triton" outside Triton's interpreter.
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
    return getattr(import_module(f"atpo_kernels.{operator}.triton"), operator)
