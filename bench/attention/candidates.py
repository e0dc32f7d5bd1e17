"""Our own attention with other tiles, timed beside itself: which is faster becomes the default in `tiles.py`.

A candidate sets its tiles for the time of a call, forward and backward. Outside Triton's kernels it has no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from atpo_kernels.tree_attention.tiles import Tile, Tiles, tiles_for
from bench.attention.cases import CANDIDATES


@dataclass(frozen=True)
class Change:
    """What is changed, in words, and the tiles that take the place of others."""

    note: str
    of: Callable[[Tiles], Tiles]


def _key_gradient(*tile: int) -> Callable[[Tiles], Tiles]:
    return lambda tiles: tiles._replace(key_gradient=Tile(*tile))


def _without_stages(tiles: Tiles) -> Tiles:
    """Do not pipeline the loops over partial blocks of queries."""
    forward, query_gradient = (tile._replace(partial_stages=1) for tile in tiles[:2])
    return tiles._replace(forward=forward, query_gradient=query_gradient)


CHANGES = {
    "key_stages_3": Change("ours, three stages in the loop of dK and dV", _key_gradient(64, 128, 8, 3, 1)),
    "key_partial_2": Change("ours, loop of dK and dV over partial blocks pipelined", _key_gradient(64, 128, 8, 2, 2)),
    "partial_1": Change("ours, loops over partial blocks of the forward and of dQ not pipelined", _without_stages),
}
assert set(CHANGES) == set(CANDIDATES)


@contextmanager
def changed(name: str) -> Iterator[None]:
    """Take a candidate's tiles while active; sizes of blocks, and so the lists, stay as they are."""
    launch: Any = import_module("atpo_kernels.tree_attention.launch")
    try:
        launch.tiles_for = lambda *given: CHANGES[name].of(tiles_for(*given))
        yield
    finally:
        launch.tiles_for = tiles_for
