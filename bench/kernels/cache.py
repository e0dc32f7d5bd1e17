"""What was compiled before on this machine, by digest, so that a check compiles only what has changed.

One file for each version of Triton, `~/.cache/atpo_fast/compiled-VERSION.json` (or in `$XDG_CACHE_HOME`). It holds the
numbers of a variant, not its code; errors are not kept. Delete the file to compile everything again.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from bench.kernels.compilation import Resources
from bench.kernels.variants import Job

_NUMBERS = ("warps", "stages", "registers", "spills", "shared", "tensor_memory")


class CompiledCache:
    """Numbers of compiled variants by architecture and digest."""

    def __init__(self) -> None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.path = root / "atpo_fast" / f"compiled-{triton.__version__}.json"
        self._numbers: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def find(self, job: Job) -> Resources | None:
        """Return what a variant takes, or None if it has not been compiled on this machine."""
        numbers = self._numbers.get(_key(job.name[0], job.source))
        if numbers is None:
            return None
        arch, kernel, label = job.name
        fields = numbers | {"spills": tuple(numbers["spills"])}
        return Resources(arch=arch, kernel=kernel, label=label, source=job.source, **fields)

    def add(self, found: Resources) -> None:
        """Keep what a variant takes; the file is written aside and then renamed."""
        fields = asdict(found)
        self._numbers[_key(found.arch, found.source)] = {name: fields[name] for name in _NUMBERS}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(f".{os.getpid()}.partial")
        aside.write_text(json.dumps(self._numbers, indent=0))
        aside.replace(self.path)


def _key(arch: str, source: str) -> str:
    return f"{arch} {source}"
