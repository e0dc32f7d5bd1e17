"""The shape of the house: who may import whom (pyproject.toml, `tool.importlinter`), and how long a file may be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST, LONGEST_TEST, SHORTEST = 400, 620, 25
PACKAGES = ("atpo_fast", "kernels/atpo_kernels", "bench")

SHORT = {
    "atpo_fast/__main__.py": "starts the command line",
    "atpo_fast/common/certificates.py": "what the clients of search and of model servers share",
    "atpo_fast/common/log.py": "the one set-up of logging, which every entry point calls",
    "atpo_fast/common/ranks.py": "one collective, which credit, packing and policy must not import from the trainer",
    "atpo_fast/common/threads.py": "one setting, which has to be made before PyTorch is imported",
    "atpo_fast/config/section.py": "what all sections share, which none of them can hold",
    "bench/attention/bench_attention.py": "what pytest-benchmark runs of this subject, of which each has its file",
    "bench/attention/sdpa.py": "one implementation to compare with, of which each has its file",
    "bench/update/bench_update.py": "what pytest-benchmark runs of this subject, of which each has its file",
    "kernels/atpo_kernels/hosts/__main__.py": "starts the check of the hosts",
    "kernels/atpo_kernels/hosts/verl/plugin.py": "registers when it is imported, which nothing else must",
}
"""Files of fewer lines than `SHORTEST`, and why they are; those named __init__.py are not asked."""


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def number_of_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts over the packages in `folder`, in a process that has imported none of them."""
    code = "import sys; from importlinter.cli import lint_imports as lint; sys.exit(lint(sys.argv[1], no_cache=True))"
    paths = os.pathsep.join([str(folder), str(folder / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "COLUMNS": "300"}
    command = [sys.executable, "-c", code, str(ROOT / "pyproject.toml")]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_imports_keep_the_contracts() -> None:
    """Fails for an import against the flow, typed or lazy ones included, and for a new folder without a place."""
    found = lint(ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


BACK_ARROWS = {
    "atpo_fast/objective/objective.py": "from atpo_fast.packing import spread_rows",
    "atpo_fast/credit/assign.py": "if TYPE_CHECKING:\n    from atpo_fast.config import CreditConfig",
    "atpo_fast/policy/head.py": "def late() -> None:\n    from atpo_fast.packing.pack import pack_trees",
    "atpo_fast/rollout/turns.py": "import atpo_fast.policy.policy",
    "atpo_fast/telemetry/phases.py": "import deepspeed",
    "kernels/atpo_kernels/dispatch.py": "import atpo_fast.common.ranks",
    "kernels/atpo_kernels/linear_logprob/tiles.py": "import atpo_kernels.turn_policy_loss.reference",
}


def test_contracts_see_back_arrows(tmp_path: Path) -> None:
    """Fails if the contracts overlook a direction, an import for type checkers or in a function, or a new folder."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path, line in BACK_ARROWS.items():
        with (tmp_path / path).open("a") as file:
            file.write(f"\n{line}\n")
    (tmp_path / "atpo_fast/new_folder").mkdir()
    (tmp_path / "atpo_fast/new_folder/__init__.py").touch()
    found = lint(tmp_path)
    assert found.returncode == 1, found.stdout + found.stderr
    for path, line in BACK_ARROWS.items():
        module = path.removeprefix("kernels/").removesuffix(".py").replace("/", ".")
        target = line.split("import ")[-1] if line.startswith("import") else line.split("from ")[1].split(" import")[0]
        assert f"{module} -> {target}" in found.stdout, found.stdout
    assert "new_folder" in found.stdout, found.stdout


@pytest.mark.parametrize("folder", PACKAGES)
def test_files_are_not_long(folder: str) -> None:
    """Fails for a file that holds more than one thing."""
    assert not {str(p): n for p in python_files(folder) if (n := number_of_lines(p)) > LONGEST}


def test_test_files_are_not_long() -> None:
    """Fails for a file of tests that nobody reads to its end."""
    assert not {str(p): n for p in python_files("tests") if (n := number_of_lines(p)) > LONGEST_TEST}


@pytest.mark.parametrize("folder", PACKAGES)
def test_files_are_not_short_without_a_reason(folder: str) -> None:
    """Fails for a file that belongs into another, and for a reason whose file has grown or gone."""
    short = {str(p.relative_to(ROOT)) for p in python_files(folder) if number_of_lines(p) < SHORTEST}
    assert {path for path in short if not path.endswith("__init__.py")} == {p for p in SHORT if p.startswith(folder)}
