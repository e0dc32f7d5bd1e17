"""Garbage of benches, collected without looking at what other tests have imported and made."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def short_collections() -> Iterator[None]:
    """Keep what is there out of collections: a bench collects after every implementation, a second for each in a long
    run of tests. What the bench itself makes is collected as ever."""
    gc.freeze()
    yield
    gc.unfreeze()
