"""Kernels of `linear_turn_policy_loss` in every configuration that is launched, for compilation ahead of time."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from atpo_kernels.linear_logprob.tiles import Tile, tile_for
from atpo_kernels.linear_turn_policy_loss.kernels import _kept_rows_kernel, _softmax_gradient_kernel
from atpo_kernels.linear_turn_policy_loss.tiles import GRADIENT_TILES, KEPT_BLOCK, GradientTile
from bench.kernels.operators import DTYPE_NAMES, Variant


def variants(target: str) -> list[Variant]:
    """List the kernels that only this operator has, on a target ("sm_90", ...); it launches those of others as well."""
    integers = dict.fromkeys(("start", "rows"), "i32")
    kept = {"grad_logprob": "*fp32", "kept": "*i32", "count": "*i32"}
    found = [
        Variant(
            kernel=_kept_rows_kernel,
            label=f"blocks of {KEPT_BLOCK}",
            types=kept | integers,
            constants={"BLOCK": KEPT_BLOCK},
            num_warps=8,
            divisible=tuple(kept),
        )
    ]
    for dtype, every, has_entropy in product(DTYPE_NAMES, (False, True), (False, True)):
        found.append(_gradient_variant(tile_for(target, dtype), dtype, every, has_entropy))
    return found


def _gradient_variant(
    tile: Tile, dtype: torch.dtype, every: bool, has_entropy: bool, ours: GradientTile = GRADIENT_TILES["gpu"]
) -> Variant:
    stored = "*fp32" if dtype == torch.float32 else "*fp16"
    floats = ("references", "logprob", "entropy", "peak", "log_total", "grad_logprob")
    types = {"exponentials": stored, "dlogits": f"*{DTYPE_NAMES[dtype]}", "targets": "*i64"}
    types |= dict.fromkeys(floats, "*fp32") | {"count": "i32" if every else "*i32"}
    types |= {"start": "i32", "stride": "i32", "capacity": "i32"}
    types |= {"scale": "fp32", "inverse_temperature": "fp32"}
    types |= ({} if every else {"kept": "*i32"}) | ({"grad_entropy": "*fp32"} if has_entropy else {})
    constants: dict[str, Any] = {name: None for name in ("kept", "grad_entropy") if name not in types}
    constants |= {"ALL_ROWS": every, "HAS_ENTROPY": has_entropy, "PARTS": ours.parts, "PREFETCH": ours.prefetch}
    constants |= {"ROWS": ours.rows, "COLUMNS": tile.columns // ours.parts}
    label = DTYPE_NAMES[dtype] + (", all rows" if every else ", kept rows") + (", entropy" if has_entropy else "")
    pointers = tuple(name for name, kind in types.items() if kind.startswith("*"))
    return Variant(
        kernel=_softmax_gradient_kernel, label=label, types=types, constants=constants, divisible=(*pointers, "stride")
    )
