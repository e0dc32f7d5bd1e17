"""Show the records of the head's operators in the report."""

from __future__ import annotations

from math import prod
from typing import Any

from bench.core.tables import MODES, Section, short
from bench.core.verdicts import Record


def title(record: Record) -> str:
    """Describe the case of a record in words."""
    parts = [MODES[record["mode"]], " × ".join(map(str, record["shape"])), record["dtype"]]
    if record["bench"] == "turn_policy_loss":
        parts.append("packed" if len(record["shape"]) == 1 else "padded")
    else:
        parts.append("peaked logits" if record["peaked"] else "random logits")
    if record["loss_tokens"] != 1:
        parts.append(f"{record['loss_tokens']:.0%} of the tokens with loss")
    if record["clipped"]:
        parts.append(f"{record['clipped']:.0%} of the turns clipped")
    if record["turn_length"] != 64:
        parts.append(f"turns of {record['turn_length']}")
    return ", ".join(parts)


def order(record: Record) -> tuple[Any, ...]:
    """Sort key: large shapes first, sweeps after what they are compared with."""
    sweep = (record["clipped"], -record["loss_tokens"], record["turn_length"] != 64, record["turn_length"])
    return (-prod(record["shape"]), record["mode"], record["dtype"], record["peaked"], *sweep)


def ratios(records: list[Record]) -> list[str]:
    """Write every implementation's time over ours, a case a line."""
    measured = (n for r in records for n, entry in r["implementations"].items() if "ms" in entry and n != "ours")
    names = list(dict.fromkeys(measured))
    lines = [f"| time / ours | ours, ms | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for record in records:
        times = {n: e["ms"]["p50"] for n, e in record["implementations"].items() if "ms" in e}
        if "ours" in times:
            cells = [f"{times[n] / times['ours']:.2f}" if n in times else "" for n in names]
            lines.append(f"| {title(record)} | {short(times['ours'])} | {' | '.join(cells)} |")
    return [*lines, ""]


SECTIONS = tuple(
    Section(bench=bench, title=title, order=order, overview=ratios)
    for bench in ("linear_turn_policy_loss", "linear_logprob", "turn_policy_loss")
)
