"""Tables of an evaluation in Markdown: one laid out as the published tables, and one with all numbers of each set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from atpo_fast.evaluation.published import PUBLISHED, SIZES, PublishedRow
from atpo_fast.evaluation.sets import BENCHMARKS, MULTI_HOP, SINGLE_HOP, benchmark_of
from atpo_fast.evaluation.statistics import LEVEL, Estimate
from atpo_fast.evaluation.summary import Average, SetSummary, Summary

_GROUPS = (MULTI_HOP, SINGLE_HOP)
Value = Callable[[SetSummary | Average], str]


def render(summary: Summary, title: str) -> str:
    """Return the page of an evaluation."""
    parts = [f"# Evaluation of {title}", "", *benchmark_table(summary), "", *set_table(summary)]
    return "\n".join(parts) + "\n"


def benchmark_table(summary: Summary) -> list[str]:
    """Return the lines of the table in the published layout; none where no set is one of the benchmarks.

    Averages are over questions, as the published ones. One that lacks benchmarks has an asterisk.
    """
    if not any(group in summary.averages for group in _GROUPS):
        return []
    headings = ["per cent"]
    for group in _GROUPS:
        headings += [*(benchmark.name for benchmark in BENCHMARKS if benchmark.group == group), "Avg"]
    rows = [
        ["EM", *_benchmark_cells(summary, lambda part: f"{100 * part.em.mean:.2f}")],
        [f"EM, {LEVEL:.0%} interval", *_benchmark_cells(summary, lambda part: _interval(part.em))],
        ["F1", *_benchmark_cells(summary, lambda part: f"{100 * part.f1.mean:.2f}")],
        [f"F1, {LEVEL:.0%} interval", *_benchmark_cells(summary, lambda part: _interval(part.f1))],
        ["EM, unicode", *_benchmark_cells(summary, lambda part: _unicode(summary, part, "em"))],
        ["F1, unicode", *_benchmark_cells(summary, lambda part: _unicode(summary, part, "f1"))],
        ["questions", *_benchmark_cells(summary, lambda part: _questions(summary, part))],
        *(_published_cells(row) for row in PUBLISHED),
        ["*published: questions*", *_published_sizes()],
    ]
    notes = ["* unicode: scored once more, with one form of accents, dashes, quotes and widths (reward.normalise)"]
    notes += [f"* published: {row.label}: {row.source}" for row in PUBLISHED]
    notes.append(
        "* Published rows are EM of other models on whole evaluation sets, with retrieval over all of Wikipedia; they "
        "compare with ours only where questions and corpus are the same."
    )
    incomplete = [part for name, part in summary.averages.items() if name in _GROUPS and not part.complete]
    notes += [f"* \\* average over {', '.join(part.sets)} only" for part in incomplete]
    return [*_table(headings, rows), "", *notes]


def set_table(summary: Summary) -> list[str]:
    """Return the lines of the table with a row for each set and one for all of them."""
    ks = sorted({k for found in summary.sets.values() for k in found.pass_at})
    votes = sorted({found.samples for found in summary.sets.values() if found.majority is not None})
    headings = [
        "set", "questions", "EM", "F1", "EM published", "F1 published", "EM unicode", "F1 unicode", "reward", "format",
        "turns", "tool calls", "tokens written", "tokens with results",
        "failed", *(f"pass@{k}" for k in ks), *(f"maj@{k}" for k in votes), "in training",
    ]  # fmt: skip
    rows = [[name, *_set_cells(found, ks, votes)] for name, found in summary.sets.items()]
    if len(rows) > 1:
        both = summary.averages["all"]
        total = sum(found.questions for found in summary.sets.values())
        rows.append(["all", str(total), _with_interval(both.em), _with_interval(both.f1)])
    return _table(headings, rows)


def _set_cells(found: SetSummary, ks: Sequence[int], votes: Sequence[int]) -> list[str]:
    cells = [str(found.questions), _with_interval(found.em), _with_interval(found.f1)]
    for kind in ("published", "unicode"):
        cells += [f"{100 * found.normalised[kind].em:.2f}", f"{100 * found.normalised[kind].f1:.2f}"]
    cells += [f"{found.reward:.3f}", f"{100 * found.format:.1f} %"]
    cells += [f"{found.turns:.2f}", f"{found.tool_calls:.2f}", f"{found.tokens:.0f}", f"{found.response_tokens:.0f}"]
    cells.append(f"{100 * found.failed:.1f} %")
    cells += [f"{100 * found.pass_at[k]:.2f}" if k in found.pass_at else "" for k in ks]
    cells += [f"{100 * (found.majority or 0):.2f}" if k == found.samples else "" for k in votes]
    return [*cells, str(found.in_training)]


def _benchmark_cells(summary: Summary, value: Value) -> list[str]:
    """Return a cell for each benchmark, of the first set that is it, and for each average; "–" where there is none."""
    by_name: dict[str, SetSummary] = {}
    for name, found in summary.sets.items():
        benchmark = benchmark_of(name)
        if benchmark is not None:
            by_name.setdefault(benchmark.name, found)
    cells: list[str] = []
    for group in _GROUPS:
        names = [benchmark.name for benchmark in BENCHMARKS if benchmark.group == group]
        cells += [value(by_name[name]) if name in by_name else "–" for name in names]
        mean = summary.averages.get(group)
        cells.append("–" if mean is None else value(mean) + ("" if mean.complete else "\\*"))
    return cells


def _questions(summary: Summary, part: SetSummary | Average) -> str:
    if isinstance(part, SetSummary):
        return str(part.questions)
    return str(sum(summary.sets[name].questions for name in part.sets))


def _unicode(summary: Summary, part: SetSummary | Average, metric: str) -> str:
    """Return a mean under the normalisation `unicode`, of a set or over the questions of several."""
    parts = [part] if isinstance(part, SetSummary) else [summary.sets[name] for name in part.sets]
    values = [found.questions * float(getattr(found.normalised["unicode"], metric)) for found in parts]
    return f"{100 * sum(values) / sum(found.questions for found in parts):.2f}"


def _published_cells(row: PublishedRow) -> list[str]:
    cells = [f"*published: {row.label}*"]
    for group in _GROUPS:
        names = [benchmark.name for benchmark in BENCHMARKS if benchmark.group == group]
        own = group == row.group
        cells += [f"{row.exact_match[name]:.2f}" if own else "" for name in names]
        cells.append(f"{row.average:.1f}" if own else "")
    return cells


def _published_sizes() -> list[str]:
    cells: list[str] = []
    for group in _GROUPS:
        sizes = [SIZES[benchmark.name] for benchmark in BENCHMARKS if benchmark.group == group]
        cells += [*map(str, sizes), str(sum(sizes))]
    return cells


def _interval(value: Estimate) -> str:
    return f"{100 * value.low:.1f}–{100 * value.high:.1f}"


def _with_interval(value: Estimate) -> str:
    return f"{100 * value.mean:.2f} ({_interval(value)})"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    filled = [[*row, *[""] * (len(headings) - len(row))] for row in rows]
    return [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}", *(f"| {' | '.join(row)} |" for row in filled)]
