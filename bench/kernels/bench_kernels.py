"""Seconds to compile one variant of each kernel for sm_90: what the first call on a GPU waits for. Needs no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from bench.kernels.compilation import compile_variant
from bench.kernels.table import TABLE, read_rows
from bench.kernels.variants import Job, all_jobs, cheapest_of_each, variant_at

ARCH = "sm_90"
JOBS = list(
    cheapest_of_each((job for job in all_jobs() if job.address.arch == ARCH), read_rows(TABLE.read_text())).values()
)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.text)
def test_compilation(benchmark: Any, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time the compilation of a kernel variant."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = benchmark.pedantic(compile_variant, args=(variant_at(job.address), ARCH, job.source), rounds=1)
    benchmark.extra_info |= {"registers": found.registers, "shared": found.shared}
