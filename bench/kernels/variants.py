"""Every kernel variant that is launched, and the choice of those that the tests compile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from bench.kernels import operators as tables
from bench.kernels.compilation import ARCHITECTURES, kernel_name
from bench.kernels.digest import digest
from bench.kernels.operators import OPERATORS, Variant
from bench.kernels.table import Rows, row_registers, row_source


@dataclass(frozen=True)
class Address:
    """The place of a variant in its operator's list, because kernels cannot be pickled."""

    arch: str
    operator: str
    index: int


@dataclass(frozen=True)
class Job:
    """A variant to compile, in a process of its own."""

    address: Address
    name: tuple[str, str, str]  # architecture, kernel, label
    source: str

    @property
    def text(self) -> str:
        """Name of the variant on one line."""
        return "{} {}, {}".format(*self.name)


@cache
def variants(operator: str, arch: str) -> list[Variant]:
    """List the variants of an operator's kernels on an architecture; the list is cached."""
    return tables.variants(operator, arch)


def variant_at(address: Address) -> Variant:
    """Look up the variant at an address."""
    return variants(address.operator, address.arch)[address.index]


def all_jobs() -> Iterator[Job]:
    """List every variant of every operator that has Triton kernels, on every architecture."""
    for arch in ARCHITECTURES:
        for operator in OPERATORS:
            for index, variant in enumerate(variants(operator, arch)):
                name = (arch, kernel_name(variant), variant.label)
                yield Job(Address(arch, operator, index), name, digest(variant))


def covering(jobs: Iterable[Job], rows: Rows) -> list[Job]:
    """Choose one variant of each kernel, each on another architecture, and every variant that changed since the table.

    A variant that did not change compiles to the code that the table is of, so one of each kernel shows that compiling
    works at all; architectures take turns.
    """
    jobs = list(jobs)
    chosen = {job for job in jobs if job.name not in rows or row_source(rows[job.name]) != job.source}
    cheapest = cheapest_of_each(jobs, rows)
    for number, kernel in enumerate(sorted({kernel for _, kernel in cheapest})):
        found = [cheapest[arch, kernel] for arch in ARCHITECTURES if (arch, kernel) in cheapest]
        chosen.add(found[number % len(found)])
    return [job for job in jobs if job in chosen]


def cheapest_of_each(jobs: Iterable[Job], rows: Rows) -> dict[tuple[str, str], Job]:
    """Find the variant of each kernel on each architecture that compiles fastest.

    It is a bfloat16 variant, the dtype of training, where the kernel has one; of those it is the one that takes the
    fewest registers according to the table, because such code is short and compiles fast.
    """
    best: dict[tuple[str, str], tuple[bool, int, str, Job]] = {}
    for job in jobs:
        arch, kernel, label = job.name
        if job.name in rows:
            is_other_dtype = "bf16" not in label and "bfloat16" not in label
            cost = (is_other_dtype, row_registers(rows[job.name]), label, job)
            best[arch, kernel] = min(best.get((arch, kernel), cost), cost, key=lambda entry: entry[:3])
    return {name: job for name, (*_, job) in best.items()}
