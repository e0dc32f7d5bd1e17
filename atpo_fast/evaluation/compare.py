"""Compare two evaluations question by question: paired differences, intervals and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atpo_fast.common.errors import DataError
from atpo_fast.evaluation.answers import AnsweredQuestion
from atpo_fast.evaluation.statistics import LEVEL, Estimate, estimate, mcnemar_exact, sign_flip_test

Pair = tuple[AnsweredQuestion, AnsweredQuestion]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricDifference:
    """How far the second model is ahead of the first in one metric, on the same questions."""

    first: float
    second: float
    difference: Estimate  # second minus first, by the paired bootstrap
    p_value: float
    test: str
    only_first: int  # questions on which the first is better
    only_second: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SetComparison:
    """Two models on the questions of a set that both have answered."""

    questions: int
    em: MetricDifference
    f1: MetricDifference


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two models, by set and over all sets."""

    sets: dict[str, SetComparison]
    all: SetComparison
    left_out: tuple[int, int]  # questions that only the first, and only the second model has answered


def compare(first: Sequence[AnsweredQuestion], second: Sequence[AnsweredQuestion]) -> Comparison:
    """Compare two models on the questions that both have answered.

    Raises:
        DataError: no question is in both, or one of the same set and id has another text or other answers.
    """
    others = {question.key: question for question in second}
    pairs = [(question, others[question.key]) for question in first if question.key in others]
    if not pairs:
        raise DataError("the two evaluations have no question in common: sets and ids have to be the same")
    for one, other in pairs:
        if (one.question, one.answers) != (other.question, other.answers):
            raise DataError(f"question {one.id!r} of the set {one.set!r} is not the same in both evaluations")
    names = dict.fromkeys(one.set for one, _ in pairs)
    return Comparison(
        sets={name: _compare([pair for pair in pairs if pair[0].set == name]) for name in names},
        all=_compare(pairs),
        left_out=(len(first) - len(pairs), len(second) - len(pairs)),
    )


def render(comparison: Comparison, names: tuple[str, str]) -> str:
    """Return the comparison as Markdown."""
    first, second = names
    lines = [
        f"# {second} against {first}",
        "",
        f"| set | questions | metric | {first} | {second} | difference ({LEVEL:.0%} interval) | p | better: {first} / "
        f"{second} | test |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    sets = list(comparison.sets.items())
    for name, found in [*sets, *([("all", comparison.all)] if len(sets) > 1 else [])]:
        lines += [_row(name, found, metric, getattr(found, metric.lower())) for metric in ("EM", "F1")]
    if any(comparison.left_out):
        only_first, only_second = comparison.left_out
        lines += ["", f"Left out: {only_first} questions of {first} alone, {only_second} of {second} alone."]
    return "\n".join(lines) + "\n"


def _row(name: str, found: SetComparison, metric: str, value: MetricDifference) -> str:
    difference = value.difference
    cells = [
        name,
        str(found.questions),
        metric,
        f"{100 * value.first:.2f}",
        f"{100 * value.second:.2f}",
        f"{100 * difference.mean:+.2f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})",
        f"{value.p_value:.3g}",
        f"{value.only_first} / {value.only_second}",
        value.test,
    ]
    return f"| {' | '.join(cells)} |"


def _compare(pairs: Sequence[Pair]) -> SetComparison:
    return SetComparison(questions=len(pairs), em=_difference(pairs, "em"), f1=_difference(pairs, "f1"))


def _difference(pairs: Sequence[Pair], metric: str) -> MetricDifference:
    """Compare one metric: by McNemar's exact test where every question is right or wrong, else by randomisation."""
    first = [one.mean(metric) for one, _ in pairs]
    second = [other.mean(metric) for _, other in pairs]
    differences = [b - a for a, b in zip(first, second, strict=True)]
    only_first, only_second = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    exact = all(value in (0.0, 1.0) for value in (*first, *second))
    return MetricDifference(
        first=sum(first) / len(pairs),
        second=sum(second) / len(pairs),
        difference=estimate(differences, bounds=(-1.0, 1.0)),
        p_value=mcnemar_exact(only_first, only_second) if exact else sign_flip_test(differences),
        test="McNemar, exact" if exact else "paired randomisation",
        only_first=only_first,
        only_second=only_second,
    )
