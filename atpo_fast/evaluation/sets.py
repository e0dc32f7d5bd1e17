"""The evaluation sets of a run, and the benchmarks that sets are known as in tables.

A set is a name and its questions: those of `eval.sets`, and those of `data.eval_files`, sorted by their source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atpo_fast.common.errors import ConfigError
from atpo_fast.config import Config
from atpo_fast.data.questions import Question
from atpo_fast.data.readers import data_roots, read_question_files

Sets = dict[str, list[Question]]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark of the published tables."""

    name: str
    """Name in tables."""
    group: str
    """Average that it is part of."""
    aliases: tuple[str, ...]
    """Names of sets that are this benchmark, in small letters and without anything but letters and digits."""


MULTI_HOP, SINGLE_HOP = "multi-hop", "single-hop"
BENCHMARKS = (
    Benchmark("HotpotQA", MULTI_HOP, ("hotpotqa", "hotpot")),
    Benchmark("2Wiki", MULTI_HOP, ("2wiki", "2wikimultihopqa", "2wikimultihop", "2wikimqa")),
    Benchmark("MuSiQue", MULTI_HOP, ("musique",)),
    Benchmark("Bamboogle", MULTI_HOP, ("bamboogle",)),
    Benchmark("NQ", SINGLE_HOP, ("nq", "nqopen", "naturalquestions")),
    Benchmark("TriviaQA", SINGLE_HOP, ("triviaqa", "trivia", "tq")),
    Benchmark("PopQA", SINGLE_HOP, ("popqa",)),
)


def benchmark_of(name: str) -> Benchmark | None:
    """Return the benchmark that a set is known as, by its name; None for a set of one's own."""
    plain = "".join(character for character in name.lower() if character.isalnum())
    return next((benchmark for benchmark in BENCHMARKS if plain in benchmark.aliases), None)


def evaluation_sets(config: Config, eval_questions: Sequence[Question]) -> Sets:
    """Return the sets that `eval` and `data` name, those of `data.eval_files` first.

    Args:
        eval_questions: evaluation questions of the task, sorted here by their source.

    Raises:
        FileNotFoundError, DataError: a file of `eval.sets` cannot be used.
        ConfigError: a set of `eval.sets` has the name of a source of `data.eval_files`, or names no files.
    """
    sets: Sets = {}
    for question in eval_questions:
        sets.setdefault(question.source or "eval", []).append(question)
    for name, files in config.eval.sets.items():
        if name in sets:
            raise ConfigError(f"eval.sets: {name} is also a source of the questions in data.eval_files; rename one")
        found = read_question_files(data_roots(config.data), files, config.data.columns)
        sets[name] = found[: config.data.max_eval_questions]
    return sets
