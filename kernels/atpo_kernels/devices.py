"""What the kernels' tables of tiles ask of a device."""

from __future__ import annotations

import torch


def target_of(device: torch.device) -> str:
    """The key of the tile tables for a device. GPUs of other generations take the table of sm_80."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def processors(device: torch.device) -> int:
    """Number of multiprocessors; 4 where there are none, so that the interpreter runs several programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
