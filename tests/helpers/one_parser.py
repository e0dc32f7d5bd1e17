"""The parser of the command line, made once for many commands in one process: it takes longer than most of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

from atpo_fast.commands import cli


@pytest.fixture(scope="module", autouse=True)
def one_parser() -> Iterator[None]:
    """Keep the parser of `atpo-fast`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_parser", cache(cli._parser))
        yield
