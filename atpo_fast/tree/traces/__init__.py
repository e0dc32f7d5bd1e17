"""Rollouts that other programs recorded, as search trees: `atpo-fast import` (docs/environment_protocols.md#traces)."""

from atpo_fast.tree.traces.openenv import read_openenv
from atpo_fast.tree.traces.recorded import Episode, RecordedTurn, grow_trees
from atpo_fast.tree.traces.verifiers import read_verifiers

__all__ = ["Episode", "RecordedTurn", "grow_trees", "read_openenv", "read_verifiers"]
