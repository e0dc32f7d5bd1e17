"""What it takes to compile a kernel ahead of time: the record by which every operator lists its kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""Triton's names of the dtypes that the kernels take."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel in one configuration that a wrapper launches."""

    kernel: Any  # triton.JITFunction
    label: str
    """What tells this variant from the kernel's others, as in "bfloat16, stored"."""
    types: dict[str, str]
    """Triton type of every argument that is not a constant, as in {"hidden": "*bf16", "rows": "i32"}."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Value of every constexpr argument."""
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    """Arguments that are multiples of 16 (pointers: aligned to 16 bytes)."""
