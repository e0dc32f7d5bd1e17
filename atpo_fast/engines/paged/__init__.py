"""The engine in this process: continuous batching over a paged cache that holds every tree token once."""

from atpo_fast.engines.paged.engine import PagedEngine

__all__ = ["PagedEngine"]
