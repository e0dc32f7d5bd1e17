"""The report of a preparation: numbers and examples as JSON, and a few lines for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from atpo_fast.data.fields import normalises_to_nothing
from atpo_fast.data.preparation.prepare import PreparedQuestion, PreparedSet

_EXAMPLES = 5


def report(sets: Sequence[PreparedSet]) -> list[dict[str, Any]]:
    """Return what became of each set, as plain data."""
    return [_set_report(found) for found in sets]


def report_lines(sets: Sequence[PreparedSet]) -> list[str]:
    """Return a line for each set, and under it what was dropped and why."""
    lines: list[str] = []
    for found in sets:
        facts = _set_report(found)
        kept = f"{found.split} {found.name}: {facts['read']} read, {facts['kept']} kept in {found.path}"
        shares = [f"{words} {facts[key]:.1%}" for key, words in _SHARES.items()]
        lines.append(f"{kept} ({', '.join(shares)})")
        dropped = [f"{facts[key]} {words}" for key, words in _DROPPED.items() if facts[key]]
        if dropped:
            lines.append(f"  dropped: {', '.join(dropped)}")
        if facts["blank_answers"]:
            lines.append(f"  {facts['blank_answers']} answers of which nothing is left once they are normalised")
        for example in facts["near_examples"][:2]:
            lines.append(
                f"  near ({example['similarity']:.2f}): {example['question']!r} and {example['protected']!r} of "
                f"{example['set']}"
            )
        if facts["unusable_examples"]:
            lines.append(f"  unusable, for example: {facts['unusable_examples'][0]}")
    return lines


_SHARES = {"yes_no": "answers yes or no", "evidence": "with evidence", "paragraphs": "with paragraphs"}
_DROPPED = {
    "unusable": "without question or answer",
    "repeated": "repeated",
    "held_out": "held out for evaluation",
    "exact": "that an evaluation asks",
    "near": "that are near to one that an evaluation asks",
}


def _set_report(found: PreparedSet) -> dict[str, Any]:
    near = sorted((pair for pair in found.overlaps if pair[1].kind == "near"), key=lambda pair: -pair[1].similarity)
    examples = near if len(near) <= 2 * _EXAMPLES else [*near[:_EXAMPLES], *near[-_EXAMPLES:]]  # nearest and farthest
    exact = [overlap for _, overlap in found.overlaps if overlap.kind == "exact"]
    return {
        "name": found.name,
        "split": found.split,
        "file": str(found.path),
        "read": found.read,
        "unusable": len(found.unusable),
        "repeated": found.repeated,
        "held_out": found.held_out,
        "exact": len(exact),
        "exact_by_set": dict(Counter(overlap.set for overlap in exact)),
        "near": len(near),
        "near_by_set": dict(Counter(overlap.set for _, overlap in near)),
        "kept": len(found.kept),
        "yes_no": _share(found.kept, lambda one: {a.lower() for a in one.question.answers} <= {"yes", "no"}),
        "evidence": _share(found.kept, lambda one: "evidence_titles" in one.question.meta),
        "paragraphs": _share(found.kept, lambda one: bool(one.paragraphs)),
        "blank_answers": sum(all(map(normalises_to_nothing, one.question.answers)) for one in found.kept),
        "unusable_examples": found.unusable[:_EXAMPLES],
        "near_examples": [
            {
                "question": question.text,
                "protected": overlap.question,
                "set": overlap.set,
                "similarity": round(overlap.similarity, 3),
            }
            for question, overlap in examples
        ],
    }


def _share(questions: Sequence[PreparedQuestion], has: Callable[[PreparedQuestion], bool]) -> float:
    return sum(map(has, questions)) / max(1, len(questions))
