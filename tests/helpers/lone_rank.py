"""A process group of one rank in the process of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from atpo_fast.commands.launcher import free_port
from atpo_fast.train.zero import join_process_group


@contextmanager
def lone_rank() -> Iterator[pytest.MonkeyPatch]:
    """Join a group of this process alone on the CPU, and leave it.

    DeepSpeed leaves it, not PyTorch: it keeps groups of its own, which the next test to join would be given. What it
    has put in the place of PyTorch's linear function under ZeRO-3 is taken away: it is written in Python, and all later
    tests would run with it.
    """
    from deepspeed import comm

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (place | {"MASTER_PORT": str(free_port())}).items():
            patch.setenv(name, value)
        patch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # put back at the end
        join_process_group(cuda=False)
        with pytest.MonkeyPatch.context() as inner:
            yield inner
        comm.destroy_process_group()
