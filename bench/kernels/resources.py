"""What every Triton kernel takes of a GPU, in every configuration that is launched; compiled without a GPU.

    python -m bench resources               compile every variant, write bench/kernels/RESOURCES.md
    python -m bench resources --check       write nothing; exit with 1 if a variant does not compile, spills on sm_90,
                                            takes more than the architecture has, or differs from RESOURCES.md
    python -m bench resources --check --covering    the same for one variant of each kernel, on architectures in turn,
                                            and for every variant whose source is not the one in RESOURCES.md

Variants that were compiled before on this machine, from the same source by the same Triton, are not compiled again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

import triton

from bench.kernels.cache import CompiledCache
from bench.kernels.compilation import ARCHITECTURES, Resources, compile_variant
from bench.kernels.operators import NO_SPILLS
from bench.kernels.table import (
    TABLE,
    changed,
    is_of_this_triton,
    kib,
    missing_and_stale,
    read_rows,
    render,
    render_spills,
)
from bench.kernels.variants import Job, all_jobs, covering, variant_at

PROCESSES = os.cpu_count() or 1
FEW = 100  # variants for which starting processes costs more than it saves
TENSOR_MEMORY = 512  # columns, on sm_100


def main(arguments: list[str] | None = None) -> None:
    """Compile the kernels, and write RESOURCES.md or compare with it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench resources", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with RESOURCES.md instead of writing it")
    parser.add_argument("--covering", action="store_true", help="with --check: a covering subset and what has changed")
    options = parser.parse_args(arguments)
    if options.covering and not options.check:
        parser.error("--covering goes with --check: the table is written from all variants")
    if triton.knobs.runtime.interpret:
        sys.exit("bench resources compiles kernels, but TRITON_INTERPRET is set, which interprets them: unset it")
    text = TABLE.read_text() if TABLE.exists() else ""
    jobs = list(all_jobs())
    compiled, complaints = compile_all(covering(jobs, read_rows(text)) if options.covering else jobs)
    complaints += [complaint for found in compiled for complaint in excesses(found)]
    if options.check:
        complaints += missing_and_stale((job.name for job in jobs), read_rows(text))
        if not options.covering and is_of_this_triton(text):
            complaints += changed(compiled, read_rows(text))
    else:
        TABLE.write_text(render(compiled))
        print(f"wrote {TABLE}")
    print(f"{len(compiled)} of {len(jobs)} variants, {len(complaints)} complaints")
    if complaints:
        sys.exit("\n".join(complaints))


def compile_all(jobs: Iterable[Job]) -> tuple[list[Resources], list[str]]:
    """Return the resources of all variants in order of name, and the errors of those that do not compile."""
    cache, found, errors = CompiledCache(), {}, []
    jobs = list(jobs)
    for job in jobs:
        if (before := cache.find(job)) is not None:
            found[job] = before
    rest = [job for job in jobs if job not in found]
    print(f"{len(found)} variants compiled before on this machine, {len(rest)} to compile", flush=True)
    begun, used = time.perf_counter(), cpu_seconds()
    for done, (job, result) in enumerate(compiled_in_turn(rest), start=1):
        if isinstance(result, Resources):
            found[job] = result
            cache.add(result)
        else:
            errors.append(f"{job.text}: does not compile: {result}")
        print(f"[{done}/{len(rest)}, {time.perf_counter() - begun:.0f} s] {job.text}", flush=True)
    print(f"compiled in {cpu_seconds() - used:.0f} s of CPU time, {time.perf_counter() - begun:.0f} s in all")
    return sorted(found.values(), key=lambda one: (list(ARCHITECTURES).index(one.arch), one)), errors


def compiled_in_turn(jobs: list[Job]) -> Iterator[tuple[Job, Resources | str]]:
    """Yield every variant with its resources or its error, in order; Triton's own cache is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(PROCESSES, mp_context=context) if len(jobs) > FEW else nullcontext() as pool:
            yield from zip(jobs, map(compile_job, jobs) if pool is None else pool.map(compile_job, jobs), strict=True)


def compile_job(job: Job) -> Resources | str:
    """Return what a variant takes, or why it does not compile."""
    try:
        return compile_variant(variant_at(job.address), job.address.arch, job.source)
    except Exception as error:  # whatever it is, it is of this variant: the others are compiled all the same
        return f"{type(error).__name__}: {error}"


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its finished children."""
    return sum(use.ru_utime + use.ru_stime for use in map(getrusage, (RUSAGE_SELF, RUSAGE_CHILDREN)))


def excesses(found: Resources) -> Iterator[str]:
    """Name every limit that a variant breaks."""
    name = "{} {}, {}".format(*found.name)
    limit = ARCHITECTURES[found.arch].shared_kib
    if found.arch in NO_SPILLS and any(found.spills):
        yield f"{name}: spills {render_spills(found)}"
    if found.shared > limit * 1024:
        yield f"{name}: shared memory of {kib(found.shared)} KiB, the architecture has {limit} KiB"
    if found.tensor_memory > TENSOR_MEMORY:
        yield f"{name}: tensor memory of {found.tensor_memory} columns, the architecture has {TENSOR_MEMORY}"
