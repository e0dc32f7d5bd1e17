"""Data flows one way: a folder imports only from those before it (CONTRIBUTING.md, Layout)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "atpo_fast"
ORDER = [
    "common",
    "config",
    "tree",
    "data",
    "retrieval",
    "environment",
    "world",
    "task",
    "engines",
    "rollout",
    "credit",
]
ORDER += ["objective", "packing", "policy", "telemetry", "report", "train", "commands", "__main__"]


def imported(node: ast.AST) -> Iterator[str]:
    """Parts of atpo_fast that code imports when it runs; imports for type checkers only do not count."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("atpo_fast."):
        yield str(node.module).split(".")[1]
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


# Fails for an import against the flow, and for a new folder that nobody has placed in it.
@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_flow(path: Path) -> None:
    # A file that is run, not imported, sees everything.
    part = "__main__" if path.stem == "__main__" else path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    place = ORDER.index(part)
    for other in imported(ast.parse(path.read_text())):
        assert other == part or ORDER.index(other) < place, f"{path} imports atpo_fast.{other}"
