"""Summaries of answered questions: by set, and averaged over sets with every question counting the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from atpo_fast.common.choices import Normalisation
from atpo_fast.data.matching import exact_match, f1_score, normalise_answer
from atpo_fast.evaluation.answers import AnsweredQuestion
from atpo_fast.evaluation.sets import BENCHMARKS, benchmark_of
from atpo_fast.evaluation.statistics import (
    LEVEL,
    RESAMPLES,
    Estimate,
    estimate,
    majority,
    pass_at_k,
    weighted_estimate,
)

_MEANS = ("reward", "format", "turns", "tool_calls", "tokens", "response_tokens", "failed")


@dataclass(frozen=True, slots=True)
class Scores:
    """Mean EM and F1."""

    em: float
    f1: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SetSummary:
    """The results of one set, or of several together; shares and means are over questions and their samples."""

    questions: int
    samples: int  # answers to a question
    em: Estimate  # as the run scores it
    f1: Estimate
    normalised: dict[str, Scores]  # EM and F1 under each normalisation of answers
    reward: float
    rewards: dict[str, float]  # each reward of the task
    format: float  # share of responses in the right format
    turns: float
    tool_calls: float
    tokens: float  # tokens that the policy wrote in a response
    response_tokens: float  # those and the tokens of tool results
    failed: float  # share of chains that ended by a failure, which count as wrong
    pass_at: dict[int, float]  # k -> pass@k, for the powers of two up to the number of samples, where there are several
    majority: float | None  # EM of the majority of all samples, maj@k; None: one sample
    in_training: int  # questions that are among the training questions too


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """The mean over the questions of several sets."""

    sets: tuple[str, ...]
    complete: bool  # whether all benchmarks of the group are among them
    em: Estimate
    f1: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The results of an evaluation."""

    sets: dict[str, SetSummary]
    averages: dict[str, Average]  # "multi-hop", "single-hop" where there are such sets, and "all"

    def as_json(self) -> dict[str, Any]:
        """Return the summary as plain data, with what its intervals are."""
        return {"level": LEVEL, "resamples": RESAMPLES, **asdict(self)}


def summarise(answered: Sequence[AnsweredQuestion], in_training: Mapping[str, int] | None = None) -> Summary:
    """Summarise the answers to at least one question.

    Args:
        answered: questions of any sets.
        in_training: number of questions of a set that are training questions too.

    Raises:
        ValueError: there are no questions.
    """
    sets = by_set(answered)
    if not sets:
        raise ValueError("no questions were answered, so there is nothing to summarise")
    known = in_training or {}
    averages = {"all": average(sets, tuple(sets), complete=True)}
    for group in dict.fromkeys(benchmark.group for benchmark in BENCHMARKS):
        wanted = {benchmark.name for benchmark in BENCHMARKS if benchmark.group == group}
        members = {name: found.name for name in sets if (found := benchmark_of(name)) and found.name in wanted}
        if members:
            averages[group] = average(sets, tuple(members), complete=set(members.values()) == wanted)
    return Summary(
        sets={name: summarise_set(found, known.get(name, 0)) for name, found in sets.items()}, averages=averages
    )


def by_set(answered: Sequence[AnsweredQuestion]) -> dict[str, list[AnsweredQuestion]]:
    """Sort questions by their sets."""
    sets: dict[str, list[AnsweredQuestion]] = {}
    for question in answered:
        sets.setdefault(question.set, []).append(question)
    return sets


def summarise_set(answered: Sequence[AnsweredQuestion], in_training: int = 0) -> SetSummary:
    """Summarise the questions of one set, at least one."""
    samples = min(len(question.samples) for question in answered)
    several = samples > 1
    return SetSummary(
        questions=len(answered),
        samples=samples,
        em=estimate([question.mean("em") for question in answered]),
        f1=estimate([question.mean("f1") for question in answered]),
        normalised={kind: _normalised(answered, kind) for kind in get_args(Normalisation)},
        rewards=_rewards(answered),
        **{name: _mean(answered, name) for name in _MEANS},
        pass_at={k: _pass_at(answered, k) for k in _powers_of_two(samples)} if several else {},
        majority=sum(map(_majority, answered)) / len(answered) if several else None,
        in_training=in_training,
    )


def average(sets: Mapping[str, Sequence[AnsweredQuestion]], names: tuple[str, ...], *, complete: bool) -> Average:
    """Average EM and F1 over the questions of the sets `names`."""
    em, f1 = ([[question.mean(metric) for question in sets[name]] for name in names] for metric in ("em", "f1"))
    return Average(sets=names, complete=complete, em=weighted_estimate(em), f1=weighted_estimate(f1))


def _normalised(answered: Sequence[AnsweredQuestion], kind: Normalisation) -> Scores:
    """Score the answers once more, under a normalisation; an answer that could not be read is wrong under each."""
    em, f1 = 0.0, 0.0
    for question in answered:
        read = [sample.answer for sample in question.samples if sample.answer is not None]
        em += sum(exact_match(answer, question.answers, kind) for answer in read) / len(question.samples)
        f1 += sum(f1_score(answer, question.answers, kind) for answer in read) / len(question.samples)
    return Scores(em / len(answered), f1 / len(answered))


def _rewards(answered: Sequence[AnsweredQuestion]) -> dict[str, float]:
    """Average each reward of the task over the samples that have it."""
    found: dict[str, list[float]] = {}
    for sample in (sample for question in answered for sample in question.samples):
        for name, value in sample.rewards.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _mean(answered: Sequence[AnsweredQuestion], name: str) -> float:
    return sum(question.mean(name) for question in answered) / len(answered)


def _powers_of_two(samples: int) -> list[int]:
    """Return 1, 2, 4, ... and the number of samples itself."""
    return [*(2**i for i in range(samples.bit_length()) if 2**i < samples), samples]


def _pass_at(answered: Sequence[AnsweredQuestion], k: int) -> float:
    values = [pass_at_k(len(q.samples), sum(sample.em >= 1 for sample in q.samples), k) for q in answered]
    return sum(values) / len(values)


def _majority(question: AnsweredQuestion) -> float:
    votes = [None if sample.answer is None else normalise_answer(sample.answer) for sample in question.samples]
    return majority(votes, [sample.em for sample in question.samples])
