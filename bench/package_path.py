"""Importing this makes `atpo_kernels` importable where it is not installed (a GPU machine with only PyTorch, say)."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("atpo_kernels") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
