"""Answered questions, and the files that hold them: `eval/NAME.jsonl`, one question a line.

The first line of a file that `atpo-fast eval` writes says what the answers are of, so that a second run knows whether
it continues. Files of a training's own evaluations have no such line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from atpo_fast.common.errors import DataError
from atpo_fast.common.jsonl import append_records, read_records

HEADER = "evaluation_of"
"""Key of the first line, which no answered question has."""
_MEANS = ("em", "f1", "reward", "format", "turns", "tool_calls", "tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer to a question, with its scores."""

    answer: str | None  # answer that was read from the response; None: none could be
    em: float = 0.0
    f1: float = 0.0
    reward: float = 0.0
    rewards: dict[str, float] = field(default_factory=dict)  # each reward of the task, unweighted
    format: bool = False
    turns: int = 0
    tool_calls: int = 0
    tokens: int = 0  # tokens that the policy wrote
    response_tokens: int = 0  # those and the tokens of tool results
    response: str = ""  # all of the text after the prompt
    failed: bool = False  # whether the chain ended by a failure, and counts as wrong


FAILED = Sample(answer=None, failed=True)
"""The sample of a chain that the engine or its tools could not finish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredQuestion:
    """A question of an evaluation set and the answers sampled for it, at least one."""

    set: str
    id: str
    question: str
    answers: tuple[str, ...]  # accepted answers
    samples: tuple[Sample, ...]

    @property
    def key(self) -> tuple[str, str]:
        """Set and id, which no other question of an evaluation has."""
        return self.set, self.id

    def mean(self, name: str) -> float:
        """Average a number of the samples, such as `em`."""
        return sum(float(getattr(sample, name)) for sample in self.samples) / len(self.samples)


def to_record(answered: AnsweredQuestion) -> dict[str, Any]:
    """Return the line of a file for a question: means over the samples beside the samples themselves."""
    fields = asdict(answered)
    samples = fields.pop("samples")
    means = {name: answered.mean(name) for name in _MEANS}
    return {**fields, "answer": answered.samples[0].answer, **means, "samples": samples}


def append_answers(path: Path, answered: Iterable[AnsweredQuestion]) -> None:
    """Append questions to a file, all or none of them."""
    append_records(path, map(to_record, answered))


def write_header(path: Path, header: dict[str, Any]) -> None:
    """Begin a file of answers with the line that says what they are of."""
    append_records(path, [{HEADER: header}])


def read_answers(path: Path) -> tuple[dict[str, Any] | None, list[AnsweredQuestion]]:
    """Read the header, if there is one, and the questions of a file; a half-written last line is left out.

    Raises:
        FileNotFoundError: the file does not exist.
        DataError: a line is no answered question, or two lines are of the same one.
    """
    if path.is_dir():
        files = ", ".join(str(file) for file in sorted(path.glob("eval/*.jsonl"))) or "none are in it"
        raise DataError(f"{path} is a folder; name a file of answers ({files})")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; `atpo-fast eval` writes such files to eval/ of the run folder")
    records = read_records(path)
    header = records.pop(0)[HEADER] if records and HEADER in records[0] else None
    found = [_question(path, number, record) for number, record in enumerate(records, start=1)]
    seen: set[tuple[str, str]] = set()
    for answered in found:
        if answered.key in seen:
            raise DataError(f"{path}: question {answered.id!r} of the set {answered.set!r} stands there twice")
        seen.add(answered.key)
    return header, found


def _question(path: Path, number: int, record: dict[str, Any]) -> AnsweredQuestion:
    try:
        samples: Sequence[dict[str, Any]] = record["samples"]
        if not samples:
            raise ValueError("no samples")
        return AnsweredQuestion(
            set=record["set"],
            id=record["id"],
            question=record["question"],
            answers=tuple(record["answers"]),
            samples=tuple(Sample(**sample) for sample in samples),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: answered question {number} cannot be read ({type(error).__name__}: {error}); the file may be of "
            "another version, or none of `atpo-fast eval`"
        ) from error
