"""Tables of the kernels of each operator in every configuration that is launched, for compilation ahead of time."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""Triton's names of the dtypes that the kernels take."""
NO_SPILLS = ("sm_90",)
"""Targets on which no kernel may spill registers."""
OPERATORS = ("linear_logprob", "linear_turn_policy_loss", "tree_attention", "turn_policy_loss")
"""Operators with Triton kernels, each of which has a table in this folder."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Kernel in one configuration that an operator launches."""

    kernel: Any  # triton.JITFunction
    label: str
    """Words that distinguish this variant from the kernel's others, as in "bfloat16, stored"."""
    types: dict[str, str]
    """Triton type of every argument that is not a constant, as in {"hidden": "*bf16", "rows": "i32"}."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Value of every constexpr argument."""
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    """Arguments that are multiples of 16 (pointers: aligned to 16 bytes)."""

    @property
    def specialised(self) -> tuple[str, ...]:
        """Name those of the divisible arguments for which a launch is specialised: not all kernels ask for it."""
        asked = {x.name for x in self.kernel.params if not (x.do_not_specialize or x.do_not_specialize_on_alignment)}
        return tuple(name for name in self.divisible if name in asked)


def variants(operator: str, target: str) -> list[Variant]:
    """List the kernels of an operator in every configuration that it launches on a target ("sm_90", ...)."""
    return import_module(f"bench.kernels.operators.{operator}").variants(target)
