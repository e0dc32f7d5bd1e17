"""Bench of packing and of what else the host does before a forward."""
