"""Kernels that are compiled, in a `ForkedProcess` of tests whose kernels are interpreted."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

EXTENSION = "triton._C"


def call_with_compiler(module: str, function: str, *arguments: Any) -> int:
    """Call a function of a module that is imported here, after Triton.

    Triton decides when a function is decorated whether it is interpreted: its own are decorated when it is imported, so
    that it is imported anew, but for its extension, of which a process can have one.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        if not name.startswith(EXTENSION):
            del sys.modules[name]
    getattr(import_module(module), function)(*arguments)
    return 0
