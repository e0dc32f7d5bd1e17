"""Time and peak memory of calls, on a GPU or a CPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20  # more than any L2 cache
_GRAPH_REPLAYS = 50

Calls = dict[str, Callable[[], Any]]
Makers = dict[str, Callable[[], Callable[[], Any]]]
Entries = dict[str, dict[str, Any]]  # of a record: what was measured of each implementation
Samples = dict[str, list[float]]  # milliseconds by name of the call


def first_calls(makers: Makers, first: Callable[[str, Any], dict[str, Any]], device: str) -> tuple[Entries, Calls]:
    """Make every call and let `first` look at it: what it returns begins the call's entry.

    What is not installed or fails says so in its entry and is not among the calls.
    """
    entries: Entries = {}
    calls: Calls = {}
    for name, make in makers.items():
        entries[name] = {}
        try:
            call = make()
            entries[name] |= first(name, call)
            calls[name] = call
        except ImportError as error:
            entries[name]["skipped"] = one_line(error)
        except Exception as error:
            entries[name]["error"] = one_line(error)
        collect(device)
    return entries, calls


def side_by_side(
    makers: Makers,
    first: Callable[[str, Any], dict[str, Any]],
    about: Callable[[str], dict[str, Any]],
    device: str,
    seconds: float,
    *,
    beside: Callable[[], Calls] = dict,
    least: int = 3,
    warm: int = 1,
) -> tuple[Entries, Calls, Samples]:
    """Time implementations in the same rounds and return their entries, the calls that were timed, and all samples.

    Args:
        makers: function that makes the call of each implementation.
        first: function from a call's name and the call to what its entry keeps of the first results.
        about: function from a name to further fields of the entry.
        device: "cuda" or "cpu".
        seconds: time of the samples of each call; 0 takes one sample, and no round is thrown away.
        beside: function that makes other calls, timed in the same rounds without an entry.
        least: number of samples of every call, at least.
        warm: number of rounds that are not kept.
    """
    entries, calls = first_calls(makers, first, device)
    least, warm = (least, warm) if seconds else (1, 0)
    samples, failed = interleaved(beside() | calls, device, seconds, least=least, warm=warm)
    for name, entry in entries.items():
        entry |= about(name)
        if name in failed:
            entry["error"] = failed[name]
        elif samples.get(name):
            entry |= {"ms": quantiles(samples[name]), "samples": len(samples[name])}
    return entries, calls, samples


def collect(device: str) -> None:
    """Collect garbage and release the allocator's cached memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    """Wait until the GPU has finished; on a CPU do nothing."""
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str) -> str:
    """Name the clock of `interleaved`. A CPU may be shared: with one thread, it is the time that the process ran."""
    if device == "cuda":
        return "CUDA events, L2 flushed before every sample"
    return "process CPU time" if torch.get_num_threads() == 1 else "wall clock"


def interleaved(
    calls: Calls, device: str, seconds: float, least: int = 3, most: int = 50, warm: int = 1
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time every call in milliseconds, one sample each per round, so that all see the same clocks and neighbours.

    The first `warm` rounds are not kept: they fill the allocator's cache. A call leaves the rounds once its samples
    took `seconds` and are at least `least`. The second result has the error of every call that raised.
    """
    timer = _cuda_timer() if device == "cuda" else _cpu_timer()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    for turn in range(most + warm):
        for name, call in calls.items():
            taken = samples[name]
            if name in failed or (len(taken) >= least and sum(taken) > seconds * 1000):
                continue
            try:
                sample = timer(call)
            except Exception as error:
                failed[name] = one_line(error)
            else:
                taken += [sample] if turn >= warm else []
    return samples, failed


def quantiles(samples: list[float]) -> dict[str, float]:
    """Return p20, p50 and p80 of samples."""
    if len(samples) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), samples[0])
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {"p20": fifths[0], "p50": statistics.median(samples), "p80": fifths[3]}


def peak_bytes(call: Callable[[], Any], device: str) -> tuple[Any, int]:
    """Return a call's result and the most that torch's allocator held beyond what it held before.

    On a CPU the allocations are read from torch's profiler: exact, and like on a GPU without what libraries keep.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]  # as in the trace that it writes
    held = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return result, peak


def device_ms(call: Callable[[], Any]) -> float:
    """Time one call on the device, in milliseconds: replays of a CUDA graph, without launch latency.

    Raises RuntimeError where the call cannot be captured (it waits for the device).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(_GRAPH_REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / _GRAPH_REPLAYS


def one_line(error: Exception) -> str:
    """Write an error as a record keeps it."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def _cuda_timer() -> Callable[[Callable[[], Any]], float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def sample(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return sample


def _cpu_timer() -> Callable[[Callable[[], Any]], float]:
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def sample(call: Callable[[], Any]) -> float:
        begun = now()
        call()
        return (now() - begun) * 1000

    return sample
