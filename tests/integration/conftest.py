"""What whole runs start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.runs import write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The tiny configuration, writing to the test's own folder."""
    return write_config(tmp_path)
