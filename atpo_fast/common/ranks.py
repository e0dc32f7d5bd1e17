"""Reductions over the ranks that work with one rank, and without a process group, too."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def reduce_over_ranks(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `tensor` in place over all ranks and return it; a collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=op)
    return tensor
