"""The search tree of a question, and the flat table of many trees."""

from atpo_fast.tree.forest import Forest, as_forest
from atpo_fast.tree.turn_tree import Turn, TurnTree, overlap

__all__ = ["Forest", "Turn", "TurnTree", "as_forest", "overlap"]
