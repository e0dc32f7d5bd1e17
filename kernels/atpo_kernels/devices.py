"""Questions that operators ask of a device: its table of tiles, its number of processors, how to run on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Operator = TypeVar("Operator", bound=Callable[..., Any])


def target_of(device: torch.device) -> str:
    """Name the device's entry in the tables of tiles. GPUs of other generations take the table of sm_80."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def processors(device: torch.device) -> int:
    """Count the multiprocessors; 4 where there are none, so that the interpreter runs several programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def eager(operator: Operator) -> Operator:
    """Keep torch.compile out of an operator: a compiled model calls it as it is, with one graph break around it.

    Its plan of chunks is made on the host from the lengths of turns, and its kernels are compiled already: there is
    nothing to trace, and tracing what is around them would break the graph in many places.
    """
    disabled: Operator = torch.compiler.disable(operator, reason="the operators of atpo_kernels are not traced")
    return disabled


@contextmanager
def kernel_context(tensor: Tensor) -> Iterator[None]:
    """Let operators choose their own precision: no autocast and no TF32; and make the tensor's GPU the current one."""
    with torch.autocast(tensor.device.type, enabled=False), torch.cuda.device_of(tensor), ieee_products(tensor.device):
        yield


@contextmanager
def ieee_products(device: torch.device) -> Iterator[None]:
    """Compute float32 products in float32, also where the program allows TF32 or bfloat16 in their place.

    PyTorch has one such setting for all threads: those that multiply at the same time are precise as well. Torch reads
    it when a product is launched, so that this also holds for what is still waiting on the device.
    """
    products = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    if before in ("ieee", "none"):
        yield
        return
    products.fp32_precision = "none"  # as it is where the setting is made for all of PyTorch
    inherited = products.fp32_precision == before
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = "none" if inherited else before
