"""A process group of one rank in the process of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import nn

from atpo_fast.commands.launcher import free_port
from atpo_fast.train.zero import join_process_group


@contextmanager
def lone_rank() -> Iterator[pytest.MonkeyPatch]:
    """Join a group of this process alone on the CPU, and leave it.

    DeepSpeed leaves it, not PyTorch: it keeps groups of its own, which the next test to join would be given. Under
    ZeRO-3 it also puts a slower function in the place of PyTorch's for linear layers, and leaves it there.
    """
    from deepspeed import comm

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (place | {"MASTER_PORT": str(free_port())}).items():
            patch.setenv(name, value)
        join_process_group(cuda=False)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(nn.functional, "linear", nn.functional.linear)
            yield inner
        comm.destroy_process_group()
