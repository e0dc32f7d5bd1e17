"""Tiny models, computed with one thread."""

from tests.helpers.one_thread import one_thread

__all__ = ["one_thread"]
