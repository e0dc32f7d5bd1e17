"""Sizes of the blocks of tokens that the policy loss's kernels work on, by device.

Devices are "cpu" (Triton's interpreter: small, so that small inputs have several blocks) or any other, which takes the
sizes of a GPU.
"""

from __future__ import annotations

import torch

from atpo_kernels.kernel_launch import Blocks

# (tokens, warps) of a block in rising order; the last also serves whatever is longer
PACKED_BLOCKS = ((128, 4), (512, 8), (2048, 8))  # with 16 warps the last spills under Triton 3.6
PADDED_BLOCKS = ((256, 4), (1024, 8), (2048, 8))
# columns of the partial sums at a time, and derivatives per program
FINISH_BLOCKS = (1024, 2048)
_PACKED_BLOCKS = {"cpu": ((32, 1),)}
_PADDED_BLOCKS = {"cpu": ((32, 1),)}
_FINISH_BLOCKS = {"cpu": (16, 64)}


def packed_blocks(device: torch.device) -> Blocks:
    """Look up the blocks of packed turns."""
    return _PACKED_BLOCKS.get(device.type, PACKED_BLOCKS)


def padded_blocks(device: torch.device) -> Blocks:
    """Look up the blocks of padded rows."""
    return _PADDED_BLOCKS.get(device.type, PADDED_BLOCKS)


def packed_block(device: torch.device, tokens: int, turns: int) -> tuple[int, int]:
    """Choose (tokens, warps) of a block of packed turns: the first that holds one and a half mean turns."""
    table = packed_blocks(device)
    return next((entry for entry in table if 2 * entry[0] * turns >= 3 * tokens), table[-1])


def padded_block(device: torch.device, length: int) -> tuple[int, int]:
    """Choose (tokens, warps) of a block of padded rows: the first that holds a row."""
    table = padded_blocks(device)
    return next((entry for entry in table if entry[0] >= length), table[-1])


def finish_blocks(device: torch.device) -> tuple[int, int]:
    """Choose the columns of the partial sums at a time, and the derivatives per program, of the last launch."""
    return _FINISH_BLOCKS.get(device.type, FINISH_BLOCKS)
