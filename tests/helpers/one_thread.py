"""One thread for PyTorch in the tests' own process; a conftest.py imports the fixture for all tests of its folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Compute with one thread while the tests of a module run.

    A second thread does next to nothing for models as small as those of tests, but spins while it waits for work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
