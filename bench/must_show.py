"""What the head operators have to show, judged from records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cases import CPU_RECORD, MAIN, TOKENS

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A measured value and whether it is good enough."""

    value: str
    passed: bool

    def __str__(self) -> str:
        return f"{self.value} | {'**PASS**' if self.passed else '**FAIL**'}"


class Records:
    """The records of one device, found by what was measured."""

    def __init__(self, records: list[Record]):
        self.records = records

    def find(self, bench: str, mode: str = "gradient", shape: tuple[int, ...] = MAIN, **more: Any) -> Record:
        """The record of a case; raises LookupError where there is none. Unsaid: no sweep, and any kind of logits."""
        wanted = {"bench": bench, "mode": mode, "shape": list(shape), "loss_tokens": 1, "clipped": 0, "turn_length": 64}
        for record in self.records:
            if all(record.get(key) == value for key, value in (wanted | more).items()):
                return record
        raise LookupError(bench)

    def ours(self, *args: Any, **more: Any) -> dict[str, Any]:
        """Our entry in the record of a case; raises LookupError where it was not measured."""
        return implementation(self.find(*args, **more), "ours")


def implementation(record: Record, name: str) -> dict[str, Any]:
    """An entry that was timed; raises LookupError otherwise."""
    entry = record["implementations"].get(name, {})
    if "ms" not in entry:
        raise LookupError(name)
    return entry


def peers_of(record: Record) -> dict[str, float]:
    """p50 milliseconds of all that were timed and do the same work, but ours."""
    return {
        name: entry["ms"]["p50"]
        for name, entry in record["implementations"].items()
        if name != "ours" and "ms" in entry and entry["same_work"]
    }


def scratch_bytes(entry: dict[str, Any]) -> int:
    """Peak memory beyond inputs and gradients."""
    return entry["peak_bytes"] - entry["gradient_bytes"]


def _at_most(value: float, limit: float, unit: str, digits: str = ".1f") -> Verdict:
    return Verdict(f"{value:{digits}} {unit}", value <= limit)


def _at_least(value: float, limit: float, unit: str, digits: str = ".2f") -> Verdict:
    return Verdict(f"{value:{digits}}{unit}", value >= limit)


def _p50(entry: dict[str, Any]) -> float:
    return entry["ms"]["p50"]


TURN, LOGPROB, LOSS = "linear_turn_policy_loss", "linear_logprob", "turn_policy_loss"


def _best_peer(found: Records) -> Verdict:
    record = found.find(TURN, dtype="bfloat16", peaked=True)
    times = peers_of(record)
    if not times:
        raise LookupError("no peer")
    best = min(times, key=times.__getitem__)
    missing = [n for n, e in record["implementations"].items() if "skipped" in e or "error" in e]
    note = f", of {', '.join(times)}" + (f"; not measured: {', '.join(missing)}" if missing else "")
    verdict = _at_least(times[best] / _p50(implementation(record, "ours")), 1.25, f"× ({best}{note})")
    return verdict


def _liger(found: Records) -> Verdict:
    record = found.find(TURN, dtype="bfloat16", peaked=True)
    return _at_least(_p50(implementation(record, "liger_grpo")) / _p50(implementation(record, "ours")), 3, "×")


def _clipped(found: Records) -> Verdict:
    all_rows, half = (found.ours(TURN, dtype="bfloat16", peaked=True, clipped=x) for x in (0, 0.5))
    return _at_least(_p50(all_rows) / _p50(half), 1.3, "×")


def _constant_scratch(found: Records) -> Verdict:
    sizes = [
        scratch_bytes(found.ours(TURN, shape=(rows, *MAIN[1:]), dtype="bfloat16", peaked=True))
        for rows in (MAIN[0] // 2, MAIN[0])
    ]
    text = " and ".join(f"{size / 1e6:.0f} MB" for size in sizes)
    return Verdict(f"{text} at {MAIN[0] // 2} and {MAIN[0]} tokens", sizes[1] <= 1.05 * sizes[0])


def _precision(found: Records) -> Verdict:
    error = found.ours(LOGPROB, "forward", dtype="bfloat16", peaked=True)["errors"]["logprob"]
    passed = error["mean"] <= 1e-5 and error["max"] <= 1e-4
    return Verdict(f"mean {error['mean']:.1e}, max {error['max']:.1e}", passed)


def _loss_shapes(found: Records) -> list[Record]:
    return [found.find(LOSS, shape=shape) for shape in ((TOKENS,), (16, TOKENS // 16))]


def _loss_device_time(found: Records) -> Verdict:
    times = [implementation(record, "ours").get("device_ms") for record in _loss_shapes(found)]
    if None in times:
        raise LookupError("device time")
    text = " and ".join(f"{time * 1000:.1f} µs" for time in times)
    return Verdict(f"{text} (packed, padded; forward and backward)", max(times) <= 0.03)


def _published_loop(found: Records) -> Verdict:
    ratios, with_launches = [], []
    for record in _loss_shapes(found)[:1]:
        ours, loop = implementation(record, "ours"), _p50(implementation(record, "published_loop"))
        ratios.append(loop / ours.get("device_ms", _p50(ours)))
        with_launches.append(loop / _p50(ours))
    return _at_least(min(ratios), 1000, f"× its device time, {min(with_launches):.0f}× with launches", ".0f")


def _cpu_speed(operator: str) -> Callable[[Records], Verdict]:
    def check(found: Records) -> Verdict:
        record = found.find(operator, shape=CPU_RECORD, dtype="float32", peaked=False)
        return _at_least(_p50(implementation(record, "plain")) / _p50(implementation(record, "ours")), 1, "×")

    return check


def _cpu_memory(operator: str) -> Callable[[Records], Verdict]:
    def check(found: Records) -> Verdict:
        record = found.find(operator, shape=CPU_RECORD, dtype="float32", peaked=False)
        ours, plain = (implementation(record, name)["peak_bytes"] for name in ("ours", "plain"))
        return Verdict(f"1/{plain / ours:.1f} ({ours / 1e6:.0f} of {plain / 1e6:.0f} MB)", 8 * ours <= plain)

    return check


_SHAPE = f"({', '.join(map(str, MAIN))}) bf16"
GPU_GOALS: dict[str, Callable[[Records], Verdict]] = {
    f"{_SHAPE} forward + backward in at most 56 ms (H200)": lambda r: _at_most(
        _p50(r.ours(TURN, dtype="bfloat16", peaked=True)), 56, "ms"
    ),
    "that is at least 85 % of the same run's matrix products, at 6·A·D·V": lambda r: _at_least(
        100 * r.ours(TURN, dtype="bfloat16", peaked=True)["fraction_of_gemm"], 85, " %", ".1f"
    ),
    "log-prob and entropy without gradient: at least 85 % of it, at 2·A·D·V": lambda r: _at_least(
        100 * r.ours(LOGPROB, "forward", dtype="bfloat16", peaked=True)["fraction_of_gemm"], 85, " %", ".1f"
    ),
    "at least 1.25× the best peer": _best_peer,
    "at least 3× LigerFusedLinearGRPOLoss": _liger,
    "half of the turns clipped: at least 1.3× faster again": _clipped,
    "scratch memory at most 1 GB beyond inputs and gradients": lambda r: _at_most(
        scratch_bytes(r.ours(TURN, dtype="bfloat16", peaked=True)) / 1e9, 1, "GB", ".2f"
    ),
    "scratch memory constant in A": _constant_scratch,
    "log-prob error against float64 at most 1e-5 (mean), 1e-4 (max)": _precision,
    "turn_policy_loss on 65,536 tokens: at most 30 µs of device time": _loss_device_time,
    "turn_policy_loss: at least 1000× the published loop": _published_loop,
}
CPU_GOALS: dict[str, Callable[[Records], Verdict]] = {
    f"{operator} {what} plain PyTorch's, {CPU_RECORD} float32": check(operator)
    for operator in (TURN, LOGPROB)
    for what, check in (
        ("forward + backward: at least 1.0× the speed of", _cpu_speed),
        ("peak memory beyond inputs: at most 1/8 of", _cpu_memory),
    )
}


def judge(goals: dict[str, Callable[[Records], Verdict]], records: list[Record]) -> dict[str, Verdict | None]:
    """Verdicts; None where there is no measurement."""
    found, verdicts = Records(records), {}
    for text, check in goals.items():
        try:
            verdicts[text] = check(found)
        except LookupError:
            verdicts[text] = None
    return verdicts
