"""Compiling a kernel variant for a GPU architecture without a GPU, and reading off what the result takes."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from bench.kernels.operators import Variant


class Architecture(NamedTuple):
    """A compilation target and the shared memory that one block can have there."""

    target: GPUTarget
    shared_kib: int


ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 163),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 227),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 227),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 64),
}


@dataclass(frozen=True, order=True)
class Resources:
    """Registers and memory of one compiled variant."""

    arch: str
    kernel: str
    label: str
    warps: int
    stages: int
    registers: int
    spills: tuple[int, ...]
    """Bytes stored and loaded; on AMD the number of spilled vector registers."""
    shared: int  # bytes of shared memory
    tensor_memory: int  # columns of tensor memory, on sm_100
    source: str
    """Digest of the kernel's source and configuration: see `digest`."""

    @property
    def name(self) -> tuple[str, str, str]:
        """Name of the variant: architecture, kernel and label."""
        return self.arch, self.kernel, self.label


def kernel_name(variant: Variant) -> str:
    """Name a variant's kernel by its module within the package and its function."""
    return f"{variant.kernel.__module__.removeprefix('atpo_kernels.')}.{variant.kernel.__name__}"


def compile_variant(variant: Variant, arch: str, source: str) -> Resources:
    """Compile for an architecture and read off what the result takes; `source` is the variant's digest."""
    target = ARCHITECTURES[arch].target
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    with redirect_stdout(StringIO()) as printed, triton.knobs.nvidia.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source_of(variant), target=target, options=options)
    report = printed.getvalue()
    registers, spills = nvidia_registers(report) if target.backend == "cuda" else amd_registers(compiled)
    return Resources(
        arch=arch,
        kernel=kernel_name(variant),
        label=variant.label,
        warps=variant.num_warps,
        stages=variant.num_stages,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        source=source,
    )


def source_of(variant: Variant) -> Any:
    """Make Triton's source object: the kernel with the types and values that a launch would give its arguments."""
    names = variant.kernel.arg_names
    signature = variant.types | dict.fromkeys(variant.constants, "constexpr")
    if set(signature) != set(names):
        raise ValueError(f"types and constants are not those of its arguments: {sorted({*signature} ^ {*names})}")
    place = {name: (index,) for index, name in enumerate(names)}
    return triton.compiler.ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={place[name]: value for name, value in variant.constants.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in variant.specialised},
    )


def nvidia_registers(report: str) -> tuple[int, tuple[int, ...]]:
    """Read the registers of a thread and the bytes that it spills (stores, loads) from what ptxas told Triton.

    Triton prints it only when it compiles: not for what is in its cache.
    """
    spills = tuple(int(_first(rf"(\d+) bytes spill {kind}", report)) for kind in ("stores", "loads"))
    return int(_first(r"Used (\d+) registers", report)), spills


def amd_registers(compiled: Any) -> tuple[int, tuple[int, ...]]:
    """Read the vector registers of a thread, and how many it spills, from the assembly."""
    count, spilled = (
        int(_first(rf"\.{key}:\s+(\d+)", compiled.asm["amdgcn"])) for key in ("vgpr_count", "vgpr_spill_count")
    )
    return count, (spilled,)


def _first(pattern: str, text: str) -> str:
    """Return the group of a pattern's first match; raises ValueError where there is none."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in the compiler's output; this Triton or ptxas words it otherwise")
    return found[1]
