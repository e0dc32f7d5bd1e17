"""Tables of attention alone, a layer, the whole update and the host's preparation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tree_goals import best_flat, best_full_head
from verdicts import Record, implementation, scratch_bytes

BENCHES = ("policy_update", "decoder_layer", "tree_attention", "host_preparation")
_MODES = {"forward": "without gradient", "gradient": "forward + backward"}
Entry = dict[str, Any]


def title(record: Record) -> str:
    """A case in words."""
    tokens = record["tokens"]
    counted = f"{tokens['unique']:,} unique of {tokens['flat']:,} flat tokens"
    if record["bench"] == "host_preparation":
        return f"64 trees × 22 leaves × 3,000 tokens, {counted}"
    if record["bench"] == "tree_attention":
        heads, key_heads, width = record["heads"]
        shape = f"{heads} query and {key_heads} key heads of {width}"
        return f"{_MODES[record['mode']]}, {counted}, {shape}, {record['dtype']}"
    forest = "published settings" if record["overlap"] is None else "synthetic"
    parts = [f"{record['model']}, {forest}, overlap {record['overlap_found']:.2f}", counted]
    if record["bench"] == "policy_update":
        parts.append(f"{record['layers']} layers")
    parts += [f"rows of at most {record['max_tokens']:,}", record["dtype"]]
    if record["checkpointing"] != "none":
        parts.append("checkpointing")
    if record["clipped"]:
        parts.append(f"{record['clipped']:.0%} of the turns clipped, {record['bounds']['kept']:.0%} of the tokens stay")
    return ", ".join(parts)


def order(record: Record) -> tuple[Any, ...]:
    """For sorting: large models first, published settings before synthetic ones."""
    if record["bench"] == "host_preparation":
        return ()
    if record["bench"] == "tree_attention":
        return (record["mode"], [-heads for heads in record["heads"]], record["row_tokens"])
    synthetic = (record["overlap"] is not None, record["overlap"] or 0)
    return (-record["parameters"], record["model"], *synthetic, record["clipped"], record["max_tokens"])


def bounds_table(records: list[Record]) -> list[str]:
    """A line per layer or update: what was reached beside what can be."""
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


def case_table(record: Record) -> list[str]:
    """One case: an implementation a line; columns that nothing was measured for are left out."""
    entries = record["implementations"]
    columns = {text: [cell(record, entry) for entry in entries.values()] for text, cell in _COLUMNS.items()}
    shown = {text: cells for text, cells in columns.items() if any(cells)}
    lines = [f"**{title(record)}** (commit {record['commit']})", ""]
    lines += [f"|  | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    for at, (name, entry) in enumerate(entries.items()):
        cells = [column[at] for column in shown.values()]
        if "ms" not in entry:
            cells[:1] = ["not installed" if "skipped" in entry else f"error: {entry.get('error')}".replace("|", "/")]
        label = name if entry["same_work"] else f"{name} (other work)"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    if "parts_ms" in record:
        parts = ", ".join(f"{part} {_short(ms['p50'])} ms" for part, ms in record["parts_ms"].items())
        lines += ["", f"Of it, by itself: {parts}."]
    return [*lines, ""]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(_: Record, entry: Entry) -> str:
    if "ms" not in entry:
        return ""
    p20, p50, p80 = (_short(entry["ms"][name]) for name in ("p20", "p50", "p80"))
    return f"{p50} ({p20}–{p80})"


def _over_ours(record: Record, entry: Entry) -> str:
    try:
        ours = implementation(record, "ours")["ms"]["p50"]
    except LookupError:
        return ""
    return f"{entry['ms']['p50'] / ours:.2f}" if "ms" in entry and len(record["implementations"]) > 1 else ""


def _of_layout(field: str, layout: str, text: Callable[[float], str]) -> Callable[[Record, Entry], str]:
    return lambda _, entry: text(entry[field][layout]) if field in entry else ""


def _value(field: str) -> Callable[[Record, Entry], str]:
    return lambda _, entry: _short(entry[field]) if entry.get(field) is not None else ""


def _error(what: str) -> Callable[[Record, Entry], str]:
    def cell(_: Record, entry: Entry) -> str:
        error = entry.get("errors", {}).get(what)
        return "" if error is None else f"{error['max']:.0e} ({error['mean']:.0e})"

    return cell


_COLUMNS: dict[str, Callable[[Record, Entry], str]] = {
    "p50 ms (p20–p80)": _time,
    "time / ours": _over_ours,
    "unique tokens/s": _of_layout("tokens_per_s", "unique", _short),
    "flat tokens/s": _of_layout("tokens_per_s", "flat", _short),
    "MFU, unique": _of_layout("mfu", "unique", "{:.1%}".format),
    "MFU, flat": _of_layout("mfu", "flat", "{:.1%}".format),
    "TFLOP/s, visible pairs": _value("tflops"),
    "peak MB": lambda _, entry: _short(entry["peak_bytes"] / 1e6) if "peak_bytes" in entry else "",
    "scratch MB": lambda _, entry: _short(scratch_bytes(entry) / 1e6) if "peak_bytes" in entry else "",
    "lists and masks, ms": _value("host_ms"),
    "loss": lambda _, entry: f"{entry['loss']:.6f}" if "loss" in entry else "",
    "gradient norm": lambda _, entry: f"{entry['gradient_norm']:.5f}" if "gradient_norm" in entry else "",
    "largest (mean) error: output": _error("out"),
    "dQ": _error("query_gradient"),
}
