"""Kernels of `tree_attention` in every configuration that is launched, for compilation ahead of time."""

from __future__ import annotations

from typing import Any

import torch

from atpo_kernels.tree_attention.kernels import (
    _forward_kernel,
    _key_gradient_kernel,
    _key_sum_kernel,
    _query_gradient_kernel,
    _sink_gradient_kernel,
)
from atpo_kernels.tree_attention.tiles import SINK_QUERIES, SUMMED_KEYS, Tile, padded_width, tiles_for
from bench.kernels.operators import DTYPE_NAMES, NO_SPILLS, Variant

# head widths; float16 takes the same kernels as bfloat16, so one width shows that it compiles
WIDTHS = {torch.bfloat16: (64, 80, 96, 128, 256), torch.float16: (128,), torch.float32: (64, 80, 96, 128)}
GROUPS = (4, 7)  # a power of two, and with idle rows; others differ in constants of the same instructions
_KERNELS = {"forward": _forward_kernel, "query_gradient": _query_gradient_kernel, "key_gradient": _key_gradient_kernel}
# options of the attention, and the arguments that are None without them; only the forward knows of sinks
_ARGUMENTS = {"window": ("first_keys", "query_blocks"), "cap": ("factor",), "sinks": ("sinks",)}
_WINDOW_AND_CAP: tuple[tuple[str, ...], ...] = (("window",), ("cap",), ("window", "cap"))
_SINKS: tuple[tuple[str, ...], ...] = (("sinks",), ("window", "sinks"), ("window", "cap", "sinks"))
_LISTS = (
    "key_ends", "query_order", "full_offsets", "full", "partial_offsets", "partial", "key_parts", "split_keys",
    "first_keys", "query_blocks",
)  # fmt: skip
_STATISTICS = ("peaks", "log_total", "delta", "dk_parts", "dv_parts", "sinks", "dsinks")
_FLOATS = ("c", "factor", "scale")


def variants(target: str) -> list[Variant]:
    """List every kernel of `tree_attention` on a target ("sm_90", ...)."""
    found = [_sinks()]
    for dtype in DTYPE_NAMES:
        groups = GROUPS if dtype == torch.bfloat16 else GROUPS[:1]
        for width in WIDTHS[dtype]:
            for name in _KERNELS:
                found += [_variant(target, name, dtype, width, group) for group in groups]
                options = _options(target, name, dtype, width)
                found += [_variant(target, name, dtype, width, groups[-1], some) for some in options]
            keys = {tiles_for(target, dtype, width, capped).key_gradient.keys for capped in (False, True)}
            found += [_sum(size, dtype, width) for size in sorted(keys)]
    return found


def _options(target: str, name: str, dtype: torch.dtype, width: int) -> list[tuple[str, ...]]:
    """Choose the options of a kernel: where none may spill, several at the widths of models, and else all at once."""
    several = (*_WINDOW_AND_CAP, *_SINKS) if name == "forward" else _WINDOW_AND_CAP
    common = width in (64, 128, 256) and dtype == torch.bfloat16
    if target in NO_SPILLS:
        return list(several) if common else [several[-1]]
    return [several[-1]] if common or (dtype, width) == (torch.float32, 64) else []


def _variant(
    target: str, name: str, dtype: torch.dtype, width: int, group: int, options: tuple[str, ...] = ()
) -> Variant:
    kernel, tiles = _KERNELS[name], tiles_for(target, dtype, width, "cap" in options)
    tile: Tile = getattr(tiles, name)
    launch = tiles.constants(tile, group, width)
    num_warps, num_stages = launch.pop("num_warps"), launch.pop("num_stages")
    shape = (f"{DTYPE_NAMES[dtype]} {tile.rows}x{tile.keys}", f"width {width}", f"groups of {group}")
    absent = {argument for option in _ARGUMENTS if option not in options for argument in _ARGUMENTS[option]}
    launch |= dict.fromkeys(absent & set(kernel.arg_names))
    types, divisible = _types(kernel, launch, dtype)
    if tiles.descriptors:
        moved, rows = (("q", "do"), tile.rows) if name == "key_gradient" else (("k", "v"), tile.keys)
        types |= dict.fromkeys(moved, f"tensordesc<{DTYPE_NAMES[dtype]}[{rows}, 1, {launch['DEPTH']}]>")
    return Variant(
        kernel=kernel, label=", ".join([*shape, *options]), types=types, constants=launch, num_warps=num_warps,
        num_stages=num_stages, divisible=tuple(name for name in divisible if not types[name].startswith("tensordesc")),
    )  # fmt: skip


def _sum(keys: int, dtype: torch.dtype, width: int) -> Variant:
    constants = {"WIDTH": width, "DEPTH": padded_width(width), "KEYS": keys, "SUMMED": SUMMED_KEYS}
    types, divisible = _types(_key_sum_kernel, constants, dtype)
    label = f"{DTYPE_NAMES[dtype]} {keys} keys, width {width}"
    return Variant(kernel=_key_sum_kernel, label=label, types=types, constants=constants, divisible=divisible)


def _sinks() -> Variant:
    constants = {"BLOCK": SINK_QUERIES}
    types, divisible = _types(_sink_gradient_kernel, constants, torch.float32)
    label = f"blocks of {SINK_QUERIES}"
    return Variant(kernel=_sink_gradient_kernel, label=label, types=types, constants=constants, divisible=divisible)


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
