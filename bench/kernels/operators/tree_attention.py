"""Kernels of `tree_attention` in every configuration that is launched, for compilation ahead of time."""

from __future__ import annotations

from typing import Any

import torch

from atpo_kernels.tree_attention.kernels import (
    _forward_kernel,
    _key_gradient_kernel,
    _key_sum_kernel,
    _query_gradient_kernel,
)
from atpo_kernels.tree_attention.tiles import SUMMED_KEYS, Tile, Tiles, padded_width, tiles_for
from bench.kernels.operators import DTYPE_NAMES, Variant

# head widths; float16 takes the same kernels as bfloat16, so one width shows that it compiles
WIDTHS = {torch.bfloat16: (64, 80, 96, 128, 256), torch.float16: (128,), torch.float32: (64, 80, 96, 128)}
GROUPS = (4, 7)  # a power of two, and with idle rows; others differ in constants of the same instructions
_LISTS = ("key_ends", "query_order", "full_offsets", "full", "partial_offsets", "partial", "key_parts", "split_keys")
_STATISTICS = ("peaks", "log_total", "delta", "dk_parts", "dv_parts")
_FLOATS = ("c", "scale")


def variants(target: str) -> list[Variant]:
    """List every kernel of `tree_attention` on a target ("sm_90", ...)."""
    found = []
    for dtype in DTYPE_NAMES:
        for width in WIDTHS[dtype]:
            tiles = tiles_for(target, dtype, width)
            kernels = zip((_forward_kernel, _query_gradient_kernel, _key_gradient_kernel), tiles[:3], strict=True)
            for kernel, tile in kernels:
                groups = GROUPS if dtype == torch.bfloat16 else GROUPS[:1]
                found += [_variant(kernel, tile, tiles, dtype, width, group) for group in groups]
            found.append(_sum(tiles.key_gradient, dtype, width))
    return found


def _variant(kernel: Any, tile: Tile, tiles: Tiles, dtype: torch.dtype, width: int, group: int) -> Variant:
    launch = tiles.constants(tile, group, width)
    num_warps, num_stages = launch.pop("num_warps"), launch.pop("num_stages")
    label = f"{DTYPE_NAMES[dtype]} {tile.rows}x{tile.keys}, width {width}, groups of {group}"
    types, divisible = _types(kernel, launch, dtype)
    if tiles.descriptors:
        moved, rows = (("q", "do"), tile.rows) if kernel is _key_gradient_kernel else (("k", "v"), tile.keys)
        types |= dict.fromkeys(moved, f"tensordesc<{DTYPE_NAMES[dtype]}[{rows}, 1, {launch['DEPTH']}]>")
    return Variant(
        kernel=kernel, label=label, types=types, constants=launch, num_warps=num_warps, num_stages=num_stages,
        divisible=tuple(name for name in divisible if not types[name].startswith("tensordesc")),
    )  # fmt: skip


def _sum(tile: Tile, dtype: torch.dtype, width: int) -> Variant:
    constants = {"WIDTH": width, "DEPTH": padded_width(width), "KEYS": tile.keys, "SUMMED": SUMMED_KEYS}
    types, divisible = _types(_key_sum_kernel, constants, dtype)
    label = f"{DTYPE_NAMES[dtype]} {tile.keys} keys, width {width}"
    return Variant(kernel=_key_sum_kernel, label=label, types=types, constants=constants, divisible=divisible)


def _types(kernel: Any, constants: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, str], tuple[str, ...]]:
    """Find the type of every argument, and which are multiples of 16."""
    types = {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.do_not_specialize or name.endswith("_stride"):
            types[name] = "i32"
        elif name not in constants:
            pointer = "*i32" if name in _LISTS else "*fp32" if name in _STATISTICS else f"*{DTYPE_NAMES[dtype]}"
            types[name] = "fp32" if name in _FLOATS else pointer
    return types, tuple(name for name, kind in types.items() if kind.startswith("*") or name.endswith("_stride"))
