"""Where the tests of the kernels run: on the GPU, else on the CPU, or where ATPO_TEST_DEVICE says.

`ATPO_TEST_DEVICE=meta` takes the second device of `second_device.py`, on which a tensor that was left behind on the CPU
is found without a GPU.
"""

from __future__ import annotations

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else os.environ.get("ATPO_TEST_DEVICE", "cpu")
INTERPRETED = DEVICE != "cuda"  # whether kernels run in Triton's interpreter
