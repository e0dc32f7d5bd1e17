"""Kernels compile for every GPU they are meant for, and take no more than it has; nothing here needs a GPU.

The test compiles a covering subset; `make resources-check` compiles all variants.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from bench.kernels.compilation import Resources
from bench.kernels.digest import tokens
from bench.kernels.resources import excesses
from bench.kernels.table import (
    TABLE,
    cells,
    changed,
    is_of_this_triton,
    missing_and_stale,
    read_rows,
    render,
    row_source,
)
from bench.kernels.variants import Address, Job, covering
from tests.helpers.absent_packages import run_without
from tests.helpers.compiled_kernels import call_with_compiler
from tests.helpers.forked_runs import ForkedProcess, finish

FITTING = Resources(
    arch="sm_90", kernel="head._sum", label="bf16 64x64", warps=4, stages=3, registers=255, spills=(0, 0),
    shared=227 * 1024, tensor_memory=0, source="0123456789ab",
)  # fmt: skip


def job(found: Resources, source: str | None = None) -> Job:
    """Make the job that would compile to what was found."""
    return Job(Address(found.arch, "head", 0), found.name, source or found.source)


@pytest.mark.slow(reason="compiles a variant of each kernel")
def test_every_kernel_compiles_and_fits() -> None:
    """Fails if a kernel, or a variant that changed, does not compile, spills on sm_90 or exceeds shared memory, or if
    RESOURCES.md lacks a variant."""
    if not is_of_this_triton(TABLE.read_text()):
        pytest.skip("RESOURCES.md was made by another Triton, whose registers are others")
    finish(ForkedProcess(call_with_compiler, "bench.__main__", "main", ["resources", "--check", "--covering"]))


def test_no_variant_spills_on_sm_90_under_any_triton() -> None:
    """Fails if a variant is shipped that spills on an H100 or H200 under a Triton that the project allows, or the table
    of one of them is older than that of the other."""
    tables = {path.name: read_rows(path.read_text()) for path in TABLE.parent.glob("RESOURCES*.md")}
    assert "RESOURCES.md" in tables
    for name, rows in tables.items():
        spilling = [row for (arch, *_), row in rows.items() if arch == "sm_90" and cells(row)[5] != "0/0"]
        assert not spilling, (name, spilling)
    sources = [{key: row_source(row) for key, row in rows.items()} for rows in tables.values()]
    newest = max(sources, key=len)  # an older Triton's table may be of sm_90 alone
    assert all(found.items() <= newest.items() for found in sources)


def test_interpreted_kernels_are_not_compiled() -> None:
    """Fails if the command dies of something obscure inside Triton, as it would under the interpreter."""
    code = "import os; os.environ['TRITON_INTERPRET'] = '1'; from bench.__main__ import main; main(['resources'])"
    assert "TRITON_INTERPRET is set" in finish(ForkedProcess(run_without, [], code), code=1)


def test_excesses_are_named() -> None:
    """Fails if a limit is not looked at, or for the wrong architecture: spills matter on sm_90 only."""
    assert list(excesses(FITTING)) == []
    assert list(excesses(replace(FITTING, spills=(8, 4)))) == ["sm_90 head._sum, bf16 64x64: spills 8/4"]
    assert list(excesses(replace(FITTING, arch="sm_100", spills=(8, 4)))) == []
    for arch in ("sm_80", "gfx942"):
        assert "shared memory of 227.0 KiB" in " ".join(excesses(replace(FITTING, arch=arch)))
    assert "tensor memory" in " ".join(excesses(replace(FITTING, arch="sm_100", tensor_memory=513)))


def test_the_table_names_every_variant() -> None:
    """Fails if a new variant, one that is gone, or one with other numbers is not noticed."""
    other = replace(FITTING, arch="sm_80", label="fp16 64x64")
    rows = read_rows(render([FITTING, other]))

    def complaints(*found: Resources) -> list[str]:
        named = [*missing_and_stale((one.name for one in found), rows), *changed(found, rows)]
        return [line.split(";")[0] for line in named]

    assert complaints(FITTING, other) == []
    assert complaints(FITTING) == ["sm_80 head._sum fp16 64x64: only in RESOURCES.md"]
    assert complaints(FITTING, other, replace(FITTING, label="new")) == ["sm_90 head._sum new: not in RESOURCES.md"]
    assert complaints(FITTING, replace(other, registers=7)) == [
        "sm_80 head._sum fp16 64x64: compiled to other numbers than RESOURCES.md has"
    ]


def test_the_subset_covers_kernels_and_changes() -> None:
    """Fails if a kernel is left out or an architecture has no turn, more than one unchanged variant of a kernel is
    compiled, or a new or changed one is not."""
    cheap = replace(FITTING, label="bf16 32x32", registers=100)
    cheapest = replace(FITTING, label="fp32 16x16", registers=10)  # not the dtype of training
    other, last = (replace(FITTING, kernel=f"head.{name}", label="fp32 64x64") for name in ("_merge", "_add"))
    listed = [FITTING, cheap, cheapest, other, last]
    listed += [replace(found, arch="gfx942") for found in listed if found is not last]
    rows = read_rows(render(listed))

    def names(*jobs: Job) -> list[tuple[str, str, str]]:
        return [job.name for job in covering(jobs, rows)]

    # in order of kernels: _add is on sm_90 alone, the second takes the second architecture
    assert names(*map(job, listed)) == [cheap.name, last.name, ("gfx942", *other.name[1:])]
    new = replace(FITTING, label="new")
    assert names(job(FITTING, "changed"), *map(job, listed[1:]), job(new)) == [
        *(FITTING.name, cheap.name, last.name, ("gfx942", *other.name[1:]), new.name)
    ]


def test_digests_are_of_code() -> None:
    """Fails if a comment or a docstring counts as a change of a kernel, or a changed number does not."""
    code = 'def f(x):\n    """Add."""\n    # one\n    return x + 1\n'
    assert list(tokens(code)) == list(tokens("def f(x):\n    return x + 1  # two\n"))
    assert list(tokens(code)) != list(tokens(code.replace("+ 1", "+ 2")))
