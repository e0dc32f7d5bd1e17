"""Packing of flat batches, whose common prefixes are found and merged."""

from atpo_fast.packing.flat.batch import Trajectories
from atpo_fast.packing.flat.host_batches import trl_batch, verl_batch
from atpo_fast.packing.flat.trajectories import from_trajectories

__all__ = ["Trajectories", "from_trajectories", "trl_batch", "verl_batch"]
