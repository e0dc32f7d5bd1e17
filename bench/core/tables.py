"""Tables of RESULTS.md: for each kind of bench a section, for each case a table with an implementation a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.core.verdicts import Record, implementation, scratch_bytes

MODES = {
    "forward": "without gradient",
    "gradient": "forward + backward",
    "entropy_gradient": "forward + backward through log-prob and entropy",
}
Entry = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Section:
    """The presentation of the records of one kind of bench."""

    bench: str
    title: Callable[[Record], str]
    """A case in words."""
    order: Callable[[Record], Any]
    """Sort key of the cases."""
    overview: Callable[[list[Record]], list[str]] = lambda _: []
    """Lines before the cases."""

    def lines(self, records: list[Record]) -> list[str]:
        """Write the section of these records; without records it has no lines."""
        if not records:
            return []
        records = sorted(records, key=self.order)
        lines = [f"### `{self.bench}`", "", *_notes(records), "", *self.overview(records)]
        return lines + [line for record in records for line in self.case_table(record)]

    def case_table(self, record: Record) -> list[str]:
        """Write one case; columns that nothing was measured for are left out."""
        entries = record["implementations"]
        columns = {text: [cell(record, entry) for entry in entries.values()] for text, cell in _COLUMNS.items()}
        shown = {text: cells for text, cells in columns.items() if any(cells)}
        lines = [f"**{self.title(record)}** (commit {record['commit']})", ""]
        lines += [f"|  | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
        for at, (name, entry) in enumerate(entries.items()):
            cells = [column[at] for column in shown.values()]
            if "ms" not in entry:
                cells[:1] = [_missing(entry)]
            label = name if entry["same_work"] else f"{name} (other work)"
            lines.append(f"| {label} | {' | '.join(cells)} |")
        if "parts_ms" in record:
            parts = ", ".join(f"{part} {short(ms['p50'])} ms" for part, ms in record["parts_ms"].items())
            lines += ["", f"Of it, by itself: {parts}."]
        return [*lines, ""]


def _notes(records: list[Record]) -> list[str]:
    """List the notes on how the work of peers differs from ours."""
    found = {name: e["note"] for record in records for name, e in record["implementations"].items() if e["note"]}
    return [f"* `{name}`: {note}." for name, note in found.items()]


def _missing(entry: Entry) -> str:
    """Say why an implementation was not timed."""
    return "not installed" if "skipped" in entry else f"error: {entry.get('error')}".replace("|", "/")


def short(value: float) -> str:
    """Write a number with three digits, or in full from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(_: Record, entry: Entry) -> str:
    if "ms" not in entry:
        return ""
    p20, p50, p80 = (short(entry["ms"][name]) for name in ("p20", "p50", "p80"))
    return f"{p50} ({p20}–{p80})"


def _over_ours(record: Record, entry: Entry) -> str:
    try:
        ours = implementation(record, "ours")["ms"]["p50"]
    except LookupError:
        return ""
    return f"{entry['ms']['p50'] / ours:.2f}" if "ms" in entry and len(record["implementations"]) > 1 else ""


def _value(field: str, text: Callable[[float], str] = short, scale: float = 1.0) -> Callable[[Record, Entry], str]:
    """Make a column of one number of an entry, times a scale."""

    def cell(_: Record, entry: Entry) -> str:
        value = entry.get(field)
        return text(value * scale) if isinstance(value, int | float) else ""

    return cell


def _part(field: str, part: str, text: Callable[[float], str] = short) -> Callable[[Record, Entry], str]:
    """Make a column of one of several numbers that an entry has of one kind."""

    def cell(_: Record, entry: Entry) -> str:
        values = entry.get(field)
        return text(values[part]) if isinstance(values, dict) and part in values else ""

    return cell


def _scratch(_: Record, entry: Entry) -> str:
    return short(scratch_bytes(entry) / 1e6) if "peak_bytes" in entry else ""


def _error(what: str) -> Callable[[Record, Entry], str]:
    """Make a column of the largest and the mean error of a result."""

    def cell(_: Record, entry: Entry) -> str:
        error = entry.get("errors", {}).get(what)
        return "" if error is None else f"{error['max']:.0e} ({error['mean']:.0e})"

    return cell


_COLUMNS: dict[str, Callable[[Record, Entry], str]] = {
    "p50 ms (p20–p80)": _time,
    "device µs": _value("device_ms", "{:.1f}".format, 1000),
    "time / ours": _over_ours,
    "unique tokens/s": _part("tokens_per_s", "unique"),
    "flat tokens/s": _part("tokens_per_s", "flat"),
    "MFU, unique": _part("mfu", "unique", "{:.1%}".format),
    "effective MFU": _part("mfu", "flat", "{:.1%}".format),
    **{f"TFLOP/s at {count}": _part("tflops", count) for count in ("2ADV", "6ADV", "8ADV")},
    "TFLOP/s, visible pairs": _value("tflops"),
    "of the matrix products": _value("fraction_of_gemm", "{:.0%}".format),
    "peak MB": _value("peak_bytes", scale=1e-6),
    "scratch MB": _scratch,
    "lists and masks, ms": _value("host_ms"),
    "loss": _value("loss", "{:.6f}".format),
    "gradient norm": _value("gradient_norm", "{:.5f}".format),
    "error of log-prob": _error("logprob"),
    "entropy": _error("entropy"),
    "dX": _error("hidden_gradient"),
    "dW": _error("weight_gradient"),
    "error of gradient": _error("gradient"),
    "error of output": _error("out"),
    "dQ": _error("query_gradient"),
}
