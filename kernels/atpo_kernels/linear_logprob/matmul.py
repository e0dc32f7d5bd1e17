"""Matrix products of half-precision tensors that stay in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul_float32(
    left: Tensor,  # (M, K)
    right: Tensor,  # (K, N) same dtype
    out: Tensor,  # (M, N) float32
    accumulate: bool = False,
) -> Tensor:  # (M, N)
    """out = left @ right, or out += left @ right, from float32 accumulators that are never rounded."""
    if left.dtype == torch.float32 or left.device.type != "cuda":
        left, right = left.float(), right.float()
        return out.addmm_(left, right) if accumulate else torch.mm(left, right, out=out)
    if accumulate:
        return torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, out=out)
    return torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=out)
