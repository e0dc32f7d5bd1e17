"""RESOURCES.md, and one for each older Triton: a row for every variant on every architecture.

Written from what was compiled, and read back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import triton

from bench.kernels.compilation import ARCHITECTURES, Resources

_MINOR = ".".join(triton.__version__.split(".")[:2])
TABLE = Path(__file__).with_name("RESOURCES.md" if _MINOR == "3.7" else f"RESOURCES-{_MINOR}.md")
"""The table of the installed Triton: versions give registers otherwise."""


def render(compiled: Iterable[Resources]) -> str:
    """Render RESOURCES.md as text."""
    lines = [
        "# Registers and shared memory of the kernels",
        "",
        f"Made by Triton {triton.__version__} without a GPU; made again by `make resources`",
        "(`python -m bench resources`). Registers and spills are those of one thread, shared memory that of one block.",
        "Nothing may spill on sm_90, and no block may take more shared memory than the architecture has:",
        "`make resources-check` compiles every variant and checks it. The tests compile a variant of each kernel, on",
        "architectures in turn, and all whose source (a digest of code and configuration) is not the one below.",
    ]
    compiled = list(compiled)
    for arch, (target, shared_kib) in ARCHITECTURES.items():
        spills = "spilled bytes (stores/loads)" if target.backend == "cuda" else "spilled vector registers"
        numbers = ("warps", "stages", "registers", spills, f"shared memory (KiB of {shared_kib})")
        lines += ["", f"## {arch}", "", f"| kernel | variant | {' | '.join(numbers)} | source |"]
        lines += ["|---|---|" + "--:|" * len(numbers) + "---|"]
        lines += [render_row(found) for found in compiled if found.arch == arch]
    return "\n".join(lines) + "\n"


def render_row(found: Resources) -> str:
    """Render a kernel's resources as one line of the table."""
    numbers = (found.warps, found.stages, found.registers, render_spills(found), kib(found.shared))
    return f"| `{found.kernel}` | {found.label} | {' | '.join(map(str, numbers))} | {found.source} |"


def render_spills(found: Resources) -> str:
    """Write spills as "0/0" or, on AMD, "0"."""
    return "/".join(map(str, found.spills))


def kib(size: int) -> str:
    """Format a number of bytes in KiB, with one decimal."""
    return f"{size / 1024:.1f}"


Rows = dict[tuple[str, str, str], str]
"""Lines of the table by architecture, kernel and label."""


def read_rows(text: str) -> Rows:
    """Read the rows of a rendered table."""
    rows, arch = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            arch = line.split()[1]
        elif line.startswith("| `"):
            kernel, label = cells(line)[:2]
            rows[arch, kernel.strip("`"), label] = line
    return rows


def cells(row: str) -> list[str]:
    """Split a line of the table into its cells."""
    return [cell.strip() for cell in row.strip("|").split("|")]


def row_registers(row: str) -> int:
    """Return the number of registers in a line of the table."""
    return int(cells(row)[4])


def row_source(row: str) -> str:
    """Return the digest of the sources in a line of the table."""
    return cells(row)[-1]


def is_of_this_triton(text: str) -> bool:
    """Tell whether the installed version of Triton wrote the table; numbers of another version differ."""
    return f"Made by Triton {triton.__version__} " in text


def missing_and_stale(names: Iterable[tuple[str, str, str]], rows: Rows) -> Iterator[str]:
    """Name the variants without a row and the rows without a variant."""
    made = set(names)
    for name in sorted(made - rows.keys()):
        yield f"{' '.join(name)}: not in {TABLE.name}; run `make resources`"
    for name in sorted(rows.keys() - made):
        yield f"{' '.join(name)}: only in {TABLE.name}; run `make resources`"


def changed(compiled: Iterable[Resources], rows: Rows) -> Iterator[str]:
    """Name the variants whose row says something else than was compiled."""
    for found in compiled:
        row = rows.get(found.name)
        if row is not None and row != render_row(found):
            yield f"{' '.join(found.name)}: compiled to other numbers than {TABLE.name} has; run `make resources`"
