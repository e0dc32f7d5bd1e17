"""The search tree of a question."""

from atpo_fast.tree.turn_tree import Turn, TurnTree, overlap

__all__ = ["Turn", "TurnTree", "overlap"]
