"""Triton's interpreter where there is no CUDA device, so that the kernels' tests run everywhere."""

from __future__ import annotations

import os

import torch

# Triton reads the variable when it is imported, so it is set before any test module is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
