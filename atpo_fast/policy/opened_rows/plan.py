"""The order in which rows are forwarded and back-propagated, alike on all ranks (docs/design.md#opened-rows)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from atpo_fast.tree.packed_rows import PackedTrees

Kind = Literal["open", "whole", "close"]


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of a rank's model over one row."""

    kind: Kind
    """open: forward without gradient; keys and values are kept for the rows below. whole: forward and backward.
    close: forward and backward of an opened row, once those below it have left their gradients."""
    row: int | None
    """Index into the rank's rows; None: an empty row, because another rank has such a pass."""


def plan_passes(spread: Sequence[Sequence[PackedTrees]]) -> list[list[Pass]]:
    """Plan the passes of every rank over its rows, as `spread_rows` gave them: of one kind at a time on all ranks.

    Collectives of sharded weights then happen in the same order everywhere. Where ranks differ, the first of open,
    whole and close comes first: a rank that is to close waits for the others, so that each has a row open by then, if
    only an empty one.
    """
    wanted = [_passes([row.depth for row in rows]) for rows in spread]
    plan: list[list[Pass]] = [[] for _ in spread]
    kinds: tuple[Kind, ...] = ("open", "whole", "close")
    while any(wanted):
        kind = next(k for k in kinds if any(todo and todo[0].kind == k for todo in wanted))
        for todo, done in zip(wanted, plan, strict=True):
            done.append(todo.pop(0) if todo and todo[0].kind == kind else Pass(kind, None))
    return plan


def _passes(depths: Sequence[int]) -> list[Pass]:
    """List the passes over rows of these depths, in depth-first order."""
    passes: list[Pass] = []
    opened: list[int] = []
    for row, depth in enumerate(depths):
        while len(opened) > depth:
            passes.append(Pass("close", opened.pop()))
        if row + 1 < len(depths) and depths[row + 1] > depth:
            passes.append(Pass("open", row))
            opened.append(row)
        else:
            passes.append(Pass("whole", row))
    return passes + [Pass("close", row) for row in reversed(opened)]
