"""A launch of a kernel as a record, and the compilation of its kernel for all blocks that other calls may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Blocks = tuple[tuple[int, int], ...]
"""(tokens, warps) of the blocks that a kernel is compiled for."""

_compiled: set[tuple[Any, ...]] = set()
"""Kernels that were compiled for all their blocks, by device, types and constants."""


@dataclass(slots=True, kw_only=True)
class Launch:
    """Launch of a kernel, with its arguments by name (tensor, number or None) and its constants."""

    kernel: Any  # triton.JITFunction
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    blocks: Blocks = ()
    """Blocks that a call with other lengths would launch; they are compiled together with this one's."""

    def run(self) -> None:
        """Launch the kernel, if there is anything to do."""
        if self.programs:
            if len(self.blocks) > 1:
                self.compile_blocks()
            self.kernel[(self.programs,)](**self.arguments, **self.constants, num_warps=self.num_warps)

    def compile_blocks(self) -> None:
        """Compile the kernel for all blocks at the first call, so that no later length finds it uncompiled."""
        kinds = tuple(value.dtype if isinstance(value, Tensor) else value is None for value in self.arguments.values())
        key: tuple[Any, ...] = (self.kernel, torch.cuda.current_device() if torch.cuda.is_available() else -1, kinds)
        key += tuple(value for name, value in self.constants.items() if name != "BLOCK")
        if key in _compiled:
            return
        for block, num_warps in self.blocks:
            constants = self.constants | {"BLOCK": block}
            self.kernel.warmup(**self.arguments, **constants, num_warps=num_warps, grid=(1,))
        _compiled.add(key)
