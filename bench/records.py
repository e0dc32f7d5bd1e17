"""Records of benches: `results/NAME.json` with the commit and versions that they are of."""

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

RESULTS = Path(__file__).parent / "results"


def write_record(name: str, bench: str, folder: Path = RESULTS, **fields: Any) -> None:
    """Write one record."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"bench": bench, "commit": commit(), "torch": torch.__version__} | fields
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def read_records(bench: str | None = None, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Every record, or those of one bench, by name."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [record for record in records if bench is None or record["bench"] == bench]


def commit() -> str:
    """The commit, ending in "-dirty" where the working tree differs from it; without git, what BENCH_COMMIT says."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip()
    except OSError:
        described = ""
    return described or os.environ.get("BENCH_COMMIT", "unknown")


def device_name(device: str) -> str:
    """What was measured on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = re.findall(r"model name\s*:\s*(.*)", _read("/proc/cpuinfo"))
    name = names[0] if names else platform.processor() or platform.machine()
    return f"CPU, {name}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def slug(device: str) -> str:
    """The start of the names of a device's records."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment() -> dict[str, str]:
    """Versions beside torch's."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    return {"python": platform.python_version(), "triton": triton, "cuda": torch.version.cuda or "none"}


def package_version(name: str) -> str:
    """Of a package that is compared with; this commit for ours, torch's for what is none."""
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
