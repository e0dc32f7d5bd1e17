"""Records of benches: `results/cpu/NAME.json` and `results/gpu/GPU-NAME.json`, with the commit and the versions."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"


def write_record(name: str, bench: str, kind: str, folder: Path = RESULTS, **fields: Any) -> None:
    """Write the record of a case that was measured on "cuda" or "cpu"."""
    path = folder / "cpu" / f"{name}.json"
    if kind == "cuda":
        path = folder / "gpu" / f"{slug(device_name(kind))}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"bench": bench, "commit": commit(), "torch": torch.__version__} | fields
    path.write_text(json.dumps(record, indent=1) + "\n")


def read_records(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Read every record, in order of path."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]


def commit() -> str:
    """Name the commit, with "-dirty" where the working tree differs from it; without git, what BENCH_COMMIT says."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip()
    except OSError:
        described = ""
    return described or os.environ.get("BENCH_COMMIT", "unknown")


def device_name(kind: str) -> str:
    """Name the GPU, or the CPU with its threads, that was measured on."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    names = re.findall(r"model name\s*:\s*(.*)", _read("/proc/cpuinfo"))
    name = names[0] if names else platform.processor() or platform.machine()
    return f"CPU, {name}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def slug(device: str) -> str:
    """Turn the name of a device into the start of a file name: "cpu" for every CPU."""
    return "cpu" if device.startswith("CPU") else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def environment() -> dict[str, str]:
    """Return the versions of Python, Triton and CUDA."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    return {"python": platform.python_version(), "triton": triton, "cuda": torch.version.cuda or "none"}


def package_version(name: str) -> str:
    """Return a package's version: this commit for "ours", torch's version for a name that is no package."""
    if name == "ours":
        return commit()
    try:
        return version(name)
    except PackageNotFoundError:
        return torch.__version__


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
