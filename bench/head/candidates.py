"""Our own implementation with one thing changed, timed beside itself: which is faster becomes the default.

What is changed stands in `linear_logprob/tiles.py` and `linear_turn_policy_loss/tiles.py`, or is the size of a chunk; a
candidate sets it for the time of a call. Outside Triton's kernels a change has no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from math import ceil
from typing import Any

import torch

from bench.head.cases import CANDIDATES, MAIN

_HEAD, _FUSED = "atpo_kernels.linear_logprob.launch", "atpo_kernels.linear_turn_policy_loss.launch"


@dataclass(frozen=True)
class Change:
    """A module's attribute, and what takes its place: a function of what is there."""

    module: str
    attribute: str
    of: Callable[[Any], Any]


def _chunk(rows: int) -> tuple[Change, ...]:
    """Make chunks of that many rows of the main shape."""
    return (Change(_HEAD, "SCRATCH_BYTES", lambda _: rows * ceil(MAIN[2] / 64) * 64 * 2),)


def _tile(**fields: Any) -> tuple[Change, ...]:
    """Change fields of the half-precision tile."""

    def changed(tile_for: Any) -> Any:
        def choose(target: str, dtype: torch.dtype) -> Any:
            tile = tile_for(target, dtype)
            return tile if dtype == torch.float32 else replace(tile, **fields)

        return choose

    return (Change(_HEAD, "tile_for", changed),)


def _gradient(**fields: Any) -> tuple[Change, ...]:
    """Change fields of the tile of the gradients in place of the exponentials."""
    return (Change(_FUSED, "gradient_tile", lambda look_up: lambda device: replace(look_up(device), **fields)),)


CHANGES: dict[str, tuple[str, tuple[Change, ...]]] = {
    **{f"chunks_{rows}": (f"ours in chunks of {rows} rows", _chunk(rows)) for rows in (1664, 2560, 3328, 6144)},
    "specialised": (
        "ours, statistics by a producer and two consumer warpgroups",
        _tile(num_warps=4, warp_specialised=True),
    ),
    "branch": ("ours, the target's logit looked for only in tiles that hold one", _tile(branch=True)),
    "prefetch": ("ours, rows of the next step loaded before those of this one are stored", _gradient(prefetch=True)),
    "strips_64": ("ours, gradients in strips of 64 columns", _gradient(parts=4)),
}
NOTES = {name: note for name, (note, _) in CHANGES.items()}
assert set(CHANGES) == {name for names in CANDIDATES.values() for name in names}


@contextmanager
def changed(name: str) -> Iterator[None]:
    """Make a candidate's changes while active."""
    before = []
    try:
        for change in CHANGES[name][1]:
            module = import_module(change.module)
            before.append((module, change.attribute, getattr(module, change.attribute)))
            setattr(module, change.attribute, change.of(getattr(module, change.attribute)))
        yield
    finally:
        for module, attribute, value in reversed(before):
            setattr(module, attribute, value)
