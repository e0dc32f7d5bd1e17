"""Trainer for tree-search reinforcement learning of language-model agents (AT2PO)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atpo_fast.credit import assign_credit
    from atpo_fast.objective import Objective
    from atpo_fast.packing import from_trajectories, pack_trees
    from atpo_fast.tree import TurnTree

__all__ = ["Objective", "TurnTree", "assign_credit", "from_trajectories", "pack_trees"]

_HOME = {
    "Objective": "atpo_fast.objective",
    "TurnTree": "atpo_fast.tree",
    "assign_credit": "atpo_fast.credit",
    "from_trajectories": "atpo_fast.packing",
    "pack_trees": "atpo_fast.packing",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that importing the package costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'atpo_fast' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
