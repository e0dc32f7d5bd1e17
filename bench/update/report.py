"""Show the records of a layer and of the whole update in the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.core.tables import Section
from bench.core.verdicts import Record
from bench.update.goals import best_flat, best_full_head


def title(record: Record) -> str:
    """Describe the case of a record in words."""
    tokens = record["tokens"]
    forest = "published settings" if record["overlap"] is None else "synthetic"
    parts = [f"{record['model']}, {forest}, overlap {record['overlap_found']:.2f}"]
    parts.append(f"{tokens['unique']:,} unique of {tokens['flat']:,} flat tokens")
    if record["bench"] == "policy_update":
        parts.append(f"{record['layers']} layers")
    parts += [f"rows of at most {record['max_tokens']:,}", record["dtype"]]
    if record["checkpointing"] != "none":
        parts.append("checkpointing")
    if record["clipped"]:
        parts.append(f"{record['clipped']:.0%} of the turns clipped, {record['bounds']['kept']:.0%} of the tokens stay")
    return ", ".join(parts)


def order(record: Record) -> tuple[Any, ...]:
    """Sort key: large models first, published settings before synthetic ones."""
    synthetic = (record["overlap"] is not None, record["overlap"] or 0)
    return (-record["parameters"], record["model"], *synthetic, record["clipped"], record["max_tokens"])


def bounds_table(records: list[Record]) -> list[str]:
    """Write a line for each layer or update: what was reached beside what can be."""
    lines = ["| case | T_flat / T_tree | by FLOPs | flat / ours | by FLOPs, full head | full head / ours |"]
    lines += ["|---|---|---|---|---|---|"]
    for record in records:
        bounds = record["bounds"]
        flat, full = (_ratio(best, record) for best in (best_flat, best_full_head))
        cells = [f"{bounds['tokens']:.2f}", f"{bounds['flops']:.2f}", flat]
        cells += [f"{bounds['full_head']:.2f}", full] if record["bench"] == "policy_update" else ["", ""]
        if flat != "–":
            lines.append(f"| {title(record)} | {' | '.join(cells)} |")
    return [*lines, ""] if len(lines) > 2 else []


def _ratio(best: Callable[[Record], tuple[str, float]], record: Record) -> str:
    try:
        name, ratio = best(record)
    except LookupError:
        return "–"
    return f"{ratio:.2f} ({name})"


SECTIONS = tuple(
    Section(bench=bench, title=title, order=order, overview=bounds_table)
    for bench in ("policy_update", "decoder_layer")
)
