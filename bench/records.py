"""Records of benches: `results/NAME.json` with the commit and versions that they are of."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def write_record(name: str, bench: str, **fields: Any) -> None:
    """Write one record."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    RESULTS.mkdir(exist_ok=True)
    record = {"bench": bench, "commit": commit, "torch": torch.__version__} | fields
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
