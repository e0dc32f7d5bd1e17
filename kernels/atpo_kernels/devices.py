"""Questions that operators ask of a device: its table of tiles, its number of processors, how to run on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


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


@contextmanager
def kernel_context(tensor: Tensor) -> Iterator[None]:
    """Switch autocast off, as operators choose their own precision, and make the tensor's GPU the current one."""
    with torch.autocast(tensor.device.type, enabled=False), torch.cuda.device_of(tensor):
        yield
