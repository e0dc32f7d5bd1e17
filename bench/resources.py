"""What every Triton kernel takes of a GPU, in every configuration that is launched; compiled without a GPU.

python bench/resources.py            writes bench/RESOURCES.md
python bench/resources.py --check    writes nothing; exits with 1 if a variant spills on sm_90, takes more than the
                                     part has, or is not in bench/RESOURCES.md
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import package_path  # noqa: F401
import triton
from triton.backends.compiler import GPUTarget

from bench.kernels import operators as tables
from bench.kernels.operators import Variant

TABLE = Path(__file__).with_name("RESOURCES.md")
PROCESSES = 2
NO_SPILLS = ("sm_90",)
TENSOR_MEMORY = 512  # columns, on sm_100


class Part(NamedTuple):
    """A compilation target and the shared memory that one block can have there."""

    target: GPUTarget
    shared_kib: int


PARTS = {
    "sm_80": Part(GPUTarget("cuda", 80, 32), 163),
    "sm_90": Part(GPUTarget("cuda", 90, 32), 227),
    "sm_100": Part(GPUTarget("cuda", 100, 32), 227),
    "gfx942": Part(GPUTarget("hip", "gfx942", 64), 64),
}


class Job(NamedTuple):
    """Entry of `bench.kernels.operators.variants(operator, part)`. (Kernels themselves cannot go between processes.)"""

    part: str
    operator: str
    index: int


@dataclass(frozen=True, order=True)
class Resources:
    """What one compiled variant takes."""

    part: str
    kernel: str
    label: str
    warps: int
    stages: int
    registers: int
    spills: tuple[int, ...]
    """Bytes stored and loaded; on AMD the number of spilled vector registers."""
    shared: int  # bytes
    tensor_memory: int  # columns

    @property
    def name(self) -> tuple[str, str, str]:
        """Part, kernel and label."""
        return self.part, self.kernel, self.label


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with RESOURCES.md instead of writing it")
    check = parser.parse_args().check
    if triton.knobs.runtime.interpret:
        sys.exit("bench/resources.py compiles kernels, but TRITON_INTERPRET is set, which interprets them: unset it")
    compiled, complaints = compile_all(list(jobs()))
    complaints += [complaint for found in compiled for complaint in excesses(found)]
    if check:
        complaints += differences(compiled, TABLE.read_text() if TABLE.exists() else "")
    else:
        TABLE.write_text(render(compiled))
        print(f"wrote {TABLE}")
    print(f"{len(compiled)} variants, {len(complaints)} complaints")
    if complaints:
        sys.exit("\n".join(complaints))


def jobs() -> Iterator[Job]:
    """Every variant of every operator that has Triton kernels, on every part."""
    for part in PARTS:
        for operator in tables.OPERATORS:
            for index in range(len(variants(operator, part))):
                yield Job(part, operator, index)


@cache
def variants(operator: str, part: str) -> list[Variant]:
    """The list of an operator's kernels, made once."""
    return tables.variants(operator, part)


def kernel_name(variant: Variant) -> str:
    """Module within the package, and function."""
    return f"{variant.kernel.__module__.removeprefix('atpo_kernels.')}.{variant.kernel.__name__}"


def compile_all(work: list[Job]) -> tuple[list[Resources], list[str]]:
    """Resources of all variants in order of name, and the errors of those that do not compile."""
    compiled, errors = [], []
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done, (job, result) in enumerate(zip(work, pool.map(compile_job, work), strict=True), start=1):
            variant = variants(job.operator, job.part)[job.index]
            name = f"{job.part} {kernel_name(variant)}, {variant.label}"
            if isinstance(result, Resources):
                compiled.append(result)
            else:
                errors.append(f"{name}: does not compile: {result}")
            print(f"[{done}/{len(work)}] {name}", flush=True)
    return sorted(compiled, key=lambda found: (list(PARTS).index(found.part), found)), errors


def compile_job(job: Job) -> Resources | str:
    """What the variant takes, or why it does not compile."""
    try:
        return compile_variant(variants(job.operator, job.part)[job.index], job.part)
    except Exception as error:  # whatever it is, it is of this variant: the others are compiled all the same
        return f"{type(error).__name__}: {error}"


def compile_variant(variant: Variant, part: str) -> Resources:
    """Compile for a part and read off what the result takes."""
    target = PARTS[part].target
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source_of(variant), target=target, options=options)
    registers, spills = nvidia_registers(compiled, target.arch) if target.backend == "cuda" else amd_registers(compiled)
    return Resources(
        part=part,
        kernel=kernel_name(variant),
        label=variant.label,
        warps=variant.num_warps,
        stages=variant.num_stages,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
    )


def source_of(variant: Variant) -> triton.compiler.ASTSource:
    """The kernel with the types and values that a launch would give its arguments."""
    names = variant.kernel.arg_names
    signature = variant.types | dict.fromkeys(variant.constants, "constexpr")
    if set(signature) != set(names):
        raise ValueError(f"types and constants are not those of its arguments: {sorted({*signature} ^ {*names})}")
    place = {name: (index,) for index, name in enumerate(names)}
    return triton.compiler.ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={place[name]: value for name, value in variant.constants.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in variant.divisible},
    )


def nvidia_registers(compiled: Any, arch: int) -> tuple[int, tuple[int, int]]:
    """Registers of a thread, and bytes that it spills (stores, loads), as Triton's own ptxas reports them."""
    from triton.backends.nvidia.compiler import get_ptxas  # not there in builds for AMD only

    name = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    stores, loads = (int(re.search(rf"(\d+) bytes spill {kind}", report)[1]) for kind in ("stores", "loads"))
    return int(re.search(r"Used (\d+) registers", report)[1]), (stores, loads)


def amd_registers(compiled: Any) -> tuple[int, tuple[int]]:
    """Vector registers of a thread, and how many it spills, as the assembly states them."""
    count, spilled = (
        int(re.search(rf"\.{key}:\s+(\d+)", compiled.asm["amdgcn"])[1]) for key in ("vgpr_count", "vgpr_spill_count")
    )
    return count, (spilled,)


def excesses(found: Resources) -> Iterator[str]:
    """What is wrong with a variant."""
    name = "{} {}, {}".format(*found.name)
    if found.part in NO_SPILLS and any(found.spills):
        yield f"{name}: spills {render_spills(found)}"
    if found.shared > PARTS[found.part].shared_kib * 1024:
        yield f"{name}: shared memory of {kib(found.shared)} KiB, the part has {PARTS[found.part].shared_kib} KiB"
    if found.tensor_memory > TENSOR_MEMORY:
        yield f"{name}: tensor memory of {found.tensor_memory} columns, the part has {TENSOR_MEMORY}"


def differences(compiled: Iterable[Resources], table: str) -> list[str]:
    """Variants without a row, and rows without a variant. (Numbers differ between versions of Triton.)"""
    made, listed = {found.name for found in compiled}, set(read_names(table))
    lost = [f"{' '.join(name)}: not in {TABLE.name}; run `make resources`" for name in sorted(made - listed)]
    stale = [f"{' '.join(name)}: only in {TABLE.name}; run `make resources`" for name in sorted(listed - made)]
    return lost + stale


def read_names(table: str) -> Iterator[tuple[str, str, str]]:
    """Part, kernel and label of every row of a rendered table."""
    part = ""
    for line in table.splitlines():
        if line.startswith("## "):
            part = line.split()[1]
        elif line.startswith("| `"):
            _, kernel, label, *_ = (cell.strip() for cell in line.split("|"))
            yield part, kernel.strip("`"), label


def render(compiled: list[Resources]) -> str:
    """The content of RESOURCES.md."""
    lines = [
        "# Registers and shared memory of the kernels",
        "",
        f"Made by Triton {triton.__version__} without a GPU; made again by `make resources`",
        "(`python bench/resources.py`). Registers and spills are those of one thread, shared memory that of one block.",
        "Nothing may spill on sm_90, and no block may take more shared memory than the part has: the tests check it.",
    ]
    for part, (target, shared_kib) in PARTS.items():
        spills = "spilled bytes (stores/loads)" if target.backend == "cuda" else "spilled vector registers"
        columns = ("kernel", "variant", "warps", "stages", "registers", spills, f"shared memory (KiB of {shared_kib})")
        lines += ["", f"## {part}", "", f"| {' | '.join(columns)} |", "|---|---|" + "--:|" * (len(columns) - 2)]
        lines += [render_row(found) for found in compiled if found.part == part]
    return "\n".join(lines) + "\n"


def render_row(found: Resources) -> str:
    """One line of the table."""
    numbers = (found.warps, found.stages, found.registers, render_spills(found), kib(found.shared))
    return f"| `{found.kernel}` | {found.label} | {' | '.join(map(str, numbers))} |"


def render_spills(found: Resources) -> str:
    """ "0/0" or, on AMD, "0"."""
    return "/".join(map(str, found.spills))


def kib(size: int) -> str:
    """Bytes in KiB."""
    return f"{size / 1024:.1f}"


if __name__ == "__main__":
    main()
