"""What is measured beside the cases: the machine, its ceilings, and the fused head kernel by kernel.

    python -m bench.gpu_day.probes ceilings --results FOLDER

A record each, with its numbers in "values".
"""

from __future__ import annotations

import argparse
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from bench.core.measure import interleaved, quantiles
from bench.core.records import device_name, environment, write_record
from bench.head.cases import MAIN, HeadCase

PACKAGES = ("torch", "triton", "transformers", "numpy", "liger-kernel", "cut-cross-entropy", "trl", "flash-attn")
CHUNKS = (1664, 2560, 3072, 3328, 6144)  # rows of the products of a chunk
Values = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Run a probe, print its numbers and write its record."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_day.probes", description=__doc__)
    parser.add_argument("name", choices=PROBES)
    parser.add_argument("--results", type=Path, required=True, help="folder of the record")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="rehearse at small sizes")
    options = parser.parse_args(arguments)
    values = PROBES[options.name](options.device, options.small)
    about: Values = {"device": device_name(options.device), "environment": environment(), "values": values}
    about |= {"rehearsed": True} if options.small else {}
    write_record(options.name, f"gpu_day_{options.name}", options.device, options.results, **about)
    print(
        "; ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        )
    )


def machine(device: str, small: bool) -> Values:
    """Name versions, and what the driver says of the GPU."""
    installed = {found.metadata["Name"].lower().replace("_", "-"): found.version for found in distributions()}
    values: Values = {"python": platform.python_version(), **{name: installed.get(name, "-") for name in PACKAGES}}
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        values |= {"gpu": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}
        values["free GB"] = torch.cuda.mem_get_info()[0] / 1e9
        query = "clocks.sm,clocks.max.sm,power.limit,temperature.gpu,driver_version"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        try:
            values[query] = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            values[query] = "nvidia-smi does not answer"
    return values


def ceilings(device: str, small: bool) -> Values:
    """Time a copy, a square product, and the products of a chunk of the head with float32 results."""
    from atpo_kernels.linear_logprob.launch import matmul_float32  # needs Triton

    side, (_, width, vocab) = (8192, MAIN) if not small else (64, (128, 32, 500))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    source, square = normal(side * side * 4), normal(side, side)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        f"product {side}": lambda: square @ square,
    }
    flops = {f"product {side}": 2.0 * side**3}
    weight, by_weight = normal(vocab, width), torch.zeros(vocab, width, device=device)
    for rows in CHUNKS if not small else (64,):
        hidden, dlogits = normal(rows, width), normal(rows, vocab)
        by_hidden = torch.zeros(rows, width, device=device)
        calls[f"dX {rows}"] = lambda d=dlogits, out=by_hidden: matmul_float32(d, weight, out)  # type: ignore[misc]
        calls[f"dW {rows}"] = lambda d=dlogits, h=hidden: matmul_float32(d.t(), h, by_weight, accumulate=True)  # type: ignore[misc]
        flops |= dict.fromkeys((f"dX {rows}", f"dW {rows}"), 2.0 * rows * width * vocab)
    samples, failed = interleaved(calls, device, 0.0 if small else 0.2)
    medians = {name: quantiles(taken)["p50"] for name, taken in samples.items() if taken}
    values: Values = {f"{name} TFLOP/s": flops[name] / ms / 1e9 for name, ms in medians.items() if name in flops}
    if "copy" in medians:
        values["copy TB/s"] = 2 * source.nbytes / medians["copy"] / 1e9
    return values | failed


def profile(device: str, small: bool) -> Values:
    """Split the fused head's forward and backward by kernel, in milliseconds of the device."""
    from bench.head.calls import make_call  # needs atpo_kernels
    from bench.head.problems import make_problem

    case = HeadCase(operator="linear_turn_policy_loss", mode="gradient", shape=MAIN)
    case = case.small() if small else case
    call = make_call("ours", case, make_problem(case, device))
    call()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=kinds) as profiled:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    on_gpu = device == "cuda"
    times = {
        found.key[:60]: (found.self_device_time_total if on_gpu else found.self_cpu_time_total) / 1000
        for found in profiled.key_averages()
    }
    largest = sorted(times.items(), key=lambda item: -item[1])[:14]
    return {f"{name} ms": ms for name, ms in largest if ms > 0} | {"all ms": sum(times.values())}


PROBES: dict[str, Callable[[str, bool], Values]] = {
    "environment": machine,
    "ceilings": ceilings,
    "profile": profile,
}


if __name__ == "__main__":
    main()
