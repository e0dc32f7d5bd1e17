"""Goals of the head's operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.core.verdicts import (
    Goals,
    Record,
    Records,
    Verdict,
    at_least,
    at_most,
    implementation,
    p50,
    peers_of,
    scratch_bytes,
    times_ours,
)
from bench.head.cases import CPU_RECORD, MAIN, TOKENS

TURN, LOGPROB, LOSS = "linear_turn_policy_loss", "linear_logprob", "turn_policy_loss"


def _find(found: Records, bench: str, mode: str = "gradient", shape: tuple[int, ...] = MAIN, **more: Any) -> Record:
    """Find a record; unless the fields say otherwise, outside the sweeps and with any kind of logits."""
    unswept = {"loss_tokens": 1, "clipped": 0, "turn_length": 64}
    return found.find(bench, **{"mode": mode, "shape": list(shape)} | unswept | more)


def _ours(found: Records, *args: Any, **more: Any) -> dict[str, Any]:
    return implementation(_find(found, *args, **more), "ours")


def _best_peer(found: Records) -> Verdict:
    record = _find(found, TURN, dtype="bfloat16", peaked=True)
    times = peers_of(record)
    if not times:
        raise LookupError("no peer")
    best = min(times, key=times.__getitem__)
    missing = [n for n, e in record["implementations"].items() if "skipped" in e or "error" in e]
    note = f", of {', '.join(times)}" + (f"; not measured: {', '.join(missing)}" if missing else "")
    verdict = at_least(times[best] / p50(implementation(record, "ours")), 1.25, f"× ({best}{note})")
    return verdict


def _liger(found: Records) -> Verdict:
    record = _find(found, TURN, dtype="bfloat16", peaked=True)
    return at_least(times_ours(record, "liger_grpo"), 3, "×")


def _clipped(found: Records) -> Verdict:
    all_rows, half = (_ours(found, TURN, dtype="bfloat16", peaked=True, clipped=x) for x in (0, 0.5))
    return at_least(p50(all_rows) / p50(half), 1.3, "×")


def _constant_scratch(found: Records) -> Verdict:
    sizes = [
        scratch_bytes(_ours(found, TURN, shape=(rows, *MAIN[1:]), dtype="bfloat16", peaked=True))
        for rows in (MAIN[0] // 2, MAIN[0])
    ]
    text = " and ".join(f"{size / 1e6:.0f} MB" for size in sizes)
    return Verdict(f"{text} at {MAIN[0] // 2} and {MAIN[0]} tokens", sizes[1] <= 1.05 * sizes[0])


def _precision(found: Records) -> Verdict:
    error = _ours(found, LOGPROB, "forward", dtype="bfloat16", peaked=True)["errors"]["logprob"]
    passed = error["mean"] <= 1e-5 and error["max"] <= 1e-4
    return Verdict(f"mean {error['mean']:.1e}, max {error['max']:.1e}", passed)


def _loss_shapes(found: Records) -> list[Record]:
    return [_find(found, LOSS, shape=shape) for shape in ((TOKENS,), (16, TOKENS // 16))]


def _loss_device_time(found: Records) -> Verdict:
    entries = [implementation(record, "ours") for record in _loss_shapes(found)]
    if not all("device_ms" in entry for entry in entries):
        raise LookupError("device time")
    times = [entry["device_ms"] for entry in entries]
    text = " and ".join(f"{time * 1000:.1f} µs" for time in times)
    return Verdict(f"{text} (packed, padded; forward and backward)", max(times) <= 0.03)


def _published_loop(found: Records) -> Verdict:
    ratios, with_launches = [], []
    for record in _loss_shapes(found)[:1]:
        ours, loop = implementation(record, "ours"), p50(implementation(record, "published_loop"))
        ratios.append(loop / ours.get("device_ms", p50(ours)))
        with_launches.append(loop / p50(ours))
    return at_least(min(ratios), 1000, f"× its device time, {min(with_launches):.0f}× with launches", ".0f")


def _cpu_speed(operator: str) -> Callable[[Records], Verdict]:
    def check(found: Records) -> Verdict:
        record = _find(found, operator, shape=CPU_RECORD, dtype="float32", peaked=False)
        return at_least(times_ours(record, "plain"), 1, "×")

    return check


def _cpu_memory(operator: str) -> Callable[[Records], Verdict]:
    def check(found: Records) -> Verdict:
        record = _find(found, operator, shape=CPU_RECORD, dtype="float32", peaked=False)
        ours, plain = (implementation(record, name)["peak_bytes"] for name in ("ours", "plain"))
        return Verdict(f"1/{plain / ours:.1f} ({ours / 1e6:.0f} of {plain / 1e6:.0f} MB)", 8 * ours <= plain)

    return check


_SHAPE = f"({', '.join(map(str, MAIN))}) bf16"
EXPECTED = {
    f"{_SHAPE} forward + backward in at most 56 ms (H200)": "10 % likely: 59-63 ms expected. The product of a tile and "
    "its exponentials do not overlap, and dW moves 17 GB of float32; with warp specialisation and larger chunks 56-60",
    "that is at least 85 % of the same run's matrix products, at 6·A·D·V": "20 % likely, for the same reasons",
    "log-prob and entropy without gradient: at least 85 % of it, at 2·A·D·V": "15 % likely: 20-21 ms expected against "
    "16.2 of the product",
    "at least 1.25× the best peer": "likely against what pip installs; about 1.1× against Liger's kernels for sm_90",
    "log-prob error against float64 at most 1e-5 (mean), 1e-4 (max)": "40 % likely: tensor cores add towards zero, "
    "which is 1.2e-5 to 1.6e-5 in the mean with float32 accumulators. cuBLAS has it too; it cancels between two passes "
    "of one kernel and is 200 times below the clip range, so that the peers' error is the bar to hold",
}
"""What is expected of goals that nobody has measured, by arithmetic; and where the goal is out of reach, why."""
GPU: Goals = {
    f"{_SHAPE} forward + backward in at most 56 ms (H200)": lambda r: at_most(
        p50(_ours(r, TURN, dtype="bfloat16", peaked=True)), 56, "ms"
    ),
    "that is at least 85 % of the same run's matrix products, at 6·A·D·V": lambda r: at_least(
        100 * _ours(r, TURN, dtype="bfloat16", peaked=True)["fraction_of_gemm"], 85, " %", ".1f"
    ),
    "log-prob and entropy without gradient: at least 85 % of it, at 2·A·D·V": lambda r: at_least(
        100 * _ours(r, LOGPROB, "forward", dtype="bfloat16", peaked=True)["fraction_of_gemm"], 85, " %", ".1f"
    ),
    "at least 1.25× the best peer": _best_peer,
    "at least 3× LigerFusedLinearGRPOLoss": _liger,
    "half of the turns clipped: at least 1.3× faster again": _clipped,
    "scratch memory at most 1 GB beyond inputs and gradients": lambda r: at_most(
        scratch_bytes(_ours(r, TURN, dtype="bfloat16", peaked=True)) / 1e9, 1, "GB", ".2f"
    ),
    "scratch memory constant in A": _constant_scratch,
    "log-prob error against float64 at most 1e-5 (mean), 1e-4 (max)": _precision,
    "turn_policy_loss on 65,536 tokens: at most 30 µs of device time": _loss_device_time,
    "turn_policy_loss: at least 1000× the published loop": _published_loop,
}
CPU: Goals = {
    f"{operator} {what} plain PyTorch's, {CPU_RECORD} float32": check(operator)
    for operator in (TURN, LOGPROB)
    for what, check in (
        ("forward + backward: at least 1.0× the speed of", _cpu_speed),
        ("peak memory beyond inputs: at most 1/8 of", _cpu_memory),
    )
}
