"""Kernels of `linear_logprob` in every configuration that is launched, for compilation ahead of time."""

from __future__ import annotations

from typing import Any

import torch

from atpo_kernels.linear_logprob.kernels import _gradient_kernel, _merge_kernel, _statistics_kernel
from atpo_kernels.linear_logprob.tiles import MERGED_ROWS, MOST_SPLITS, Tile, tile_for
from bench.kernels.operators import DTYPE_NAMES, Variant

_INTEGERS = ("start", "rows", "vocab", "width", "hidden_stride", "weight_stride", "stride", "capacity", "splits")
_STRIDES = ("width", "hidden_stride", "weight_stride", "stride")


def variants(target: str) -> list[Variant]:
    """List every kernel of `linear_logprob` on a target ("sm_90", ...)."""
    found = []
    for dtype in DTYPE_NAMES:
        tile = tile_for(target, dtype)
        for has_bias in (False, True):
            found += [_statistics(tile, dtype, has_bias, stored) for stored in (False, True)]
            found += [_gradient(tile, dtype, has_bias, has_entropy) for has_entropy in (False, True)]
    return [*found, _merge()]


def _statistics(tile: Tile, dtype: torch.dtype, has_bias: bool, stored: bool) -> Variant:
    out = _buffer(tile, torch.float32 if dtype == torch.float32 else torch.float16) if stored else "constexpr"
    types = _operands(tile, dtype, has_bias) | {
        "targets": "*i64", "partial": "*fp32", "exponentials": out, "references": "*fp32" if stored else "constexpr",
        "tiles_per_split": "i32", "scale": "fp32",
    }  # fmt: skip
    label = _label(tile, dtype, has_bias) + (", stored" if stored else "")
    return _variant(_statistics_kernel, label, types, {"STORED": stored}, tile)


def _gradient(tile: Tile, dtype: torch.dtype, has_bias: bool, has_entropy: bool) -> Variant:
    pointers = ("peak", "log_total", "entropy", "grad_logprob")
    types = _operands(tile, dtype, has_bias) | {
        "targets": "*i64", "dlogits": _buffer(tile, dtype), "grad_entropy": "*fp32" if has_entropy else "constexpr",
        "tiles_per_split": "i32", "scale": "fp32", "inverse_temperature": "fp32",
    } | dict.fromkeys(pointers, "*fp32")  # fmt: skip
    label = _label(tile, dtype, has_bias) + (", entropy" if has_entropy else "")
    return _variant(_gradient_kernel, label, types, {"HAS_ENTROPY": has_entropy}, tile)


def _merge() -> Variant:
    outputs = ("partial", "logprob", "entropy", "peak", "log_total")
    types = dict.fromkeys(outputs, "*fp32") | dict.fromkeys(("start", "rows", "splits"), "i32") | {"scale": "fp32"}
    constants = {"ROWS": MERGED_ROWS, "SPLITS": MOST_SPLITS}
    label = f"up to {MOST_SPLITS} ranges"
    return Variant(kernel=_merge_kernel, label=label, types=types, constants=constants, divisible=outputs)


def _label(tile: Tile, dtype: torch.dtype, has_bias: bool) -> str:
    moved = "descriptors" if tile.descriptors else "pointers"
    size = f"{tile.rows}x{tile.columns}x{tile.depth}"
    return f"{DTYPE_NAMES[dtype]} {size} {moved}" + (", bias" if has_bias else "")


def _operands(tile: Tile, dtype: torch.dtype, has_bias: bool) -> dict[str, str]:
    name = DTYPE_NAMES[dtype]
    hidden, weight = (
        f"tensordesc<{name}[{rows}, {tile.depth}]>" if tile.descriptors else f"*{name}"
        for rows in (tile.rows, tile.columns)
    )
    return {"hidden": hidden, "weight": weight, "bias": f"*{name}" if has_bias else "constexpr"}


def _buffer(tile: Tile, dtype: torch.dtype) -> str:
    return (
        f"tensordesc<{DTYPE_NAMES[dtype]}[{tile.rows}, {tile.columns}]>"
        if tile.descriptors
        else f"*{DTYPE_NAMES[dtype]}"
    )


def _variant(kernel: Any, label: str, types: dict[str, str], constants: dict[str, Any], tile: Tile) -> Variant:
    launch = tile.constants(types["bias"] != "constexpr")
    num_warps, num_stages = launch.pop("num_warps"), launch.pop("num_stages")
    constants = constants | launch | {name: None for name, kind in types.items() if kind == "constexpr"}
    types = {name: kind for name, kind in types.items() if kind != "constexpr"}
    types |= {name: "i32" for name in _INTEGERS if name in kernel.arg_names and name not in constants}
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    return Variant(
        kernel=kernel, label=label, types=types, constants=constants, num_warps=num_warps, num_stages=num_stages,
        divisible=(*pointers, *(name for name in _STRIDES if name in types)),
    )  # fmt: skip
