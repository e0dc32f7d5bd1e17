"""Cases run on a machine with torch, triton and transformers alone: nothing is installed of ours, and no git."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.absent_packages import run_without
from tests.helpers.forked_runs import ForkedProcess, finish

ROOT = Path(__file__).resolve().parents[2]
MISSING = (
    *("bm25s", "deepspeed", "fastapi", "jsonschema", "liger_kernel", "matplotlib", "mcp", "nvtx", "psutil"),
    *("pyarrow", "pydantic", "pytest", "rich", "trl", "wandb", "xformers"),
)
CASES = """
import os, sys

os.environ |= {"PATH": sys.argv[1], "BENCH_COMMIT": "abcdefg"}
from bench.__main__ import main
from bench.update.cases import ModelCase
from bench.update.models import SHAPES, Shape

SHAPES["tiny"] = Shape(hidden=32, intermediate=64, layers=2, heads=4, key_heads=2, head_dim=16, vocab=512)
tiny = ModelCase(model="tiny", max_tokens=512, scale=80, dtype="float32", peers=("flat", "flat_padded"))
entries = tiny.measure("cpu", 0)["implementations"]
assert all("ms" in entry for entry in entries.values()), entries
main(["--device", "cpu", "--cases", "turn_policy_loss-gradient-16x4096", "--seconds", "0", "--results", sys.argv[1]])
main(["--list", "--device", "cuda"])
"""


def test_cases_run_on_a_bare_machine(tmp_path: Path) -> None:
    """Fails if what cases import needs more than torch, triton and transformers, or a record needs git."""
    assert "host_preparation" in finish(ForkedProcess(run_without, MISSING, CASES, str(tmp_path)))
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "cpu").glob("*.json"))
    assert record["commit"] == "abcdefg" and "ms" in record["implementations"]["published_loop"]


def test_a_missing_package_of_ours_is_explained() -> None:
    """Fails if somebody who forgot `kernels` on the path gets a traceback."""
    command = [sys.executable, "-S", "-m", "bench", "--list"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "PYTHONPATH=kernels" in done.stderr and "Traceback" not in done.stderr
