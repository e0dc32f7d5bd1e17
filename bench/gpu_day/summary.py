"""The summary of a session: stages, verdicts, times, candidates, as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.cases import GPU_GOALS
from bench.core.tables import short
from bench.core.verdicts import judge
from bench.gpu_day.runner import Outcome

Record = dict[str, Any]
CANDIDATES = "_candidates"  # ends the kind of records in which ours stands beside itself
FASTER = 0.99  # of ours: below, a candidate is named as the one to make the default


def summary(records: list[Record], outcomes: list[Outcome]) -> str:
    """Write what was found, for a person to paste into an issue."""
    cases = [record for record in records if "implementations" in record]
    probes = {record["bench"]: record for record in records if "implementations" not in record}
    parts = [
        head(records),
        stage_table(outcomes),
        verdict_table([record for record in cases if not record["bench"].endswith(CANDIDATES)]),
        time_table(cases),
        candidate_lines(cases),
        *(probe_lines(name, record) for name, record in probes.items() if name != "gpu_day_environment"),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def head(records: list[Record]) -> list[str]:
    """Name what was measured, by which versions, on what."""
    lines = ["# A day on a GPU", ""]
    if any(record.get("rehearsed") for record in records):
        lines += ["**A rehearsal on a CPU at small sizes: no number below means anything.**", ""]
    about = {
        key: sorted({str(record.get(key, "unknown")) for record in records}) for key in ("device", "commit", "torch")
    }
    versions = sorted({f"{k} {v}" for record in records for k, v in record.get("environment", {}).items()})
    named = [f"{key} {', '.join(values)}" for key, values in about.items() if values]
    return [*lines, "; ".join([*named, *versions]) + "."] if records else [*lines, "No record."]


def stage_table(outcomes: Iterable[Outcome]) -> list[str]:
    """Write a line for each stage."""
    lines = ["| stage | seconds | result | last line |", "|---|---|---|---|"]
    for outcome in outcomes:
        last = outcome.last_line.replace("|", "/")[:160]
        lines.append(f"| {outcome.stage.name} | {outcome.seconds:.0f} | {outcome.result} | {last} |")
    return lines


def verdict_table(records: list[Record]) -> list[str]:
    """Write a line for each goal of a GPU."""
    lines = ["| goal | measured | |", "|---|---|---|"]
    for goal, verdict in judge(GPU_GOALS, records).items():
        lines.append(f"| {goal} | {verdict or '– | not measured'} |")
    return lines


def time_table(records: list[Record]) -> list[str]:
    """Write the median times of every case, ours first, and what went wrong."""
    lines = ["| case | ms |", "|---|---|"]
    for record in sorted(records, key=lambda record: record["case"]):
        cells = []
        for name, entry in record["implementations"].items():
            if "ms" in entry:
                cells.append(f"{name} {short(entry['ms']['p50'])}")
            elif "error" in entry:
                cells.append(f"{name}: {entry['error'][:80].replace('|', '/')}")
        lines.append(f"| {record['case']} | {'; '.join(cells)} |")
    return lines


def candidate_lines(records: list[Record]) -> list[str]:
    """Say which candidate is faster than what is the default, with an error that is no larger."""
    lines = []
    for record in records:
        if not record["bench"].endswith(CANDIDATES):
            continue
        entries = {name: entry for name, entry in record["implementations"].items() if "ms" in entry}
        if "ours" not in entries:
            continue
        ours = entries["ours"]["ms"]["p50"]
        ratios = {name: entry["ms"]["p50"] / ours for name, entry in entries.items() if name != "ours"}
        good = [
            name for name, ratio in ratios.items() if ratio < FASTER and _no_less_exact(entries[name], entries["ours"])
        ]
        told = ", ".join(f"{name} {ratio:.3f}" for name, ratio in sorted(ratios.items(), key=lambda item: item[1]))
        best = f"; make {min(good, key=ratios.__getitem__)} the default" if good else "; the default stays"
        lines.append(f"* {record['case']}: time over ours: {told or 'none measured'}{best}.")
    return ["Candidates:", "", *lines] if lines else []


def _no_less_exact(entry: Record, ours: Record) -> bool:
    """Say whether no mean error is more than a tenth larger than ours."""
    errors, known = entry.get("errors", {}), ours.get("errors", {})
    return all(errors[what]["mean"] <= 1.1 * known[what]["mean"] + 1e-12 for what in known if what in errors)


def probe_lines(name: str, record: Record) -> list[str]:
    """Write the numbers of a probe."""
    values = record.get("values", {})
    told = [f"{what} {short(value) if isinstance(value, int | float) else value}" for what, value in values.items()]
    return [f"{name}: {'; '.join(told)}."] if told else []
