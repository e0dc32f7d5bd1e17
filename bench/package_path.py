"""Importing this makes `bench` importable from its scripts, and `atpo_kernels` and `atpo_fast` where they are not
installed (a GPU machine with only PyTorch, say)."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
for _name, _folder in (("atpo_kernels", _ROOT / "kernels"), ("bench", _ROOT), ("atpo_fast", _ROOT)):
    if find_spec(_name) is None:
        sys.path.insert(0, str(_folder))
