"""The parts of the program that are checked, each with the tests that ought to notice any fault in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_EQUIVALENT = Path(__file__).parent / "equivalent.json"


@dataclass(frozen=True, slots=True)
class Part:
    """Modules, and the tests that ought to notice any fault in them.

    Attributes:
        modules: patterns of their files.
        tests: files and folders of tests.
        deselected: tests that look for slowness, which no mutant here brings.
        every: one of so many mutants is tried, so that a run takes minutes.
    """

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    deselected: str = ""
    every: int = 1

    def files(self) -> list[Path]:
        """List the files of the modules."""
        return sorted(file for pattern in self.modules for file in ROOT.glob(pattern))


PARTS = {
    "loss": Part(
        (
            "kernels/atpo_kernels/turn_policy_loss/reference.py",
            "kernels/atpo_kernels/turn_policy_loss/torch_impl.py",
        ),
        ("tests/kernels/test_turn_policy_loss.py", "tests/kernels/test_turn_clip.py", "tests/objective"),
        every=3,
    ),
    "credit": Part(("atpo_fast/credit/*.py",), ("tests/credit",), every=3),
    "packing": Part(
        ("atpo_fast/packing/*.py", "atpo_fast/objective/*.py"),
        ("tests/packing", "tests/objective", "tests/policy/test_opened_rows.py"),
        every=4,
    ),
    "reward": Part(
        (
            "atpo_fast/environment/reward.py",
            "atpo_fast/environment/extraction.py",
            "atpo_fast/environment/rewards/*.py",
        ),
        (
            "tests/environment/test_reward.py",
            "tests/environment/test_extraction.py",
            "tests/environment/test_rewards.py",
        ),
        "quadratic",
        every=4,
    ),
}


def name_of(file: Path, place: str, what: str) -> str:
    """Name a mutant by file, function and fault, so that lines may move."""
    return f"{file.relative_to(ROOT)}: {place or 'module'}: {what}"


def equivalent_mutants() -> dict[str, str]:
    """Read the mutants that no input tells from the code: name -> why."""
    equivalent: dict[str, str] = json.loads(_EQUIVALENT.read_text())
    return equivalent


def module_name(file: Path) -> str:
    """Return the name that a file of the packages is imported by."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
