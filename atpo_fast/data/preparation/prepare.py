"""Read sets, hold questions out, drop training questions that an evaluation asks, and write one layout.

The layout, a line each: `id`, `question`, `golden_answers`, `data_source`; `type` and `level` where given; and where
the set has them `paragraphs` ({title, paragraph_text, is_supporting}, as MuSiQue) and `supporting_facts` ([title,
sentence or null], as HotpotQA, in the order of the facts).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from atpo_fast.common.errors import DataError
from atpo_fast.common.files import replacing
from atpo_fast.common.jsonl import append_records
from atpo_fast.data.decontamination import NEAR, Overlap, find_overlaps, normalise_question
from atpo_fast.data.paragraphs import Paragraph, paragraphs_of, supporting_facts
from atpo_fast.data.preparation.sources import SetSource, Split, locate
from atpo_fast.data.questions import Question
from atpo_fast.data.readers import distinct_ids, read_question, source_name
from atpo_fast.data.records import read_records


@dataclass(frozen=True, slots=True)
class PreparedQuestion:
    """A question with its paragraphs and the facts that support its answer."""

    question: Question
    paragraphs: tuple[Paragraph, ...]
    facts: tuple[tuple[str, int | None], ...]


@dataclass(slots=True)
class PreparedSet:
    """A set on its way to a file, and what has become of its questions."""

    name: str
    split: Split
    read: int = 0
    unusable: list[str] = field(default_factory=list)  # why records were left out
    repeated: int = 0  # questions that stand in training twice; only the first is kept
    held_out: int = 0  # questions that became a set for evaluation
    overlaps: list[tuple[Question, Overlap]] = field(default_factory=list)  # questions dropped as an evaluation's
    kept: list[PreparedQuestion] = field(default_factory=list)
    path: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What is to be prepared.

    Attributes:
        train: sets to train on, which are decontaminated.
        evaluation: sets to evaluate on, which are protected.
        against: further sets that are protected, but not written.
        held_out: number of questions of a training set that become its evaluation set.
        near: similarity of near-duplicates; None: only exact ones are dropped.
        seed: seed of what is held out.
        root: folder that files are relative to.
    """

    train: Sequence[SetSource]
    evaluation: Sequence[SetSource] = ()
    against: Sequence[SetSource] = ()
    held_out: Mapping[str, int] = field(default_factory=dict)
    near: float | None = NEAR
    seed: int = 0
    root: Path = Path(".")


def prepare(wanted: Preparation, folder: Path) -> list[PreparedSet]:
    """Prepare sets and write them to `folder`: train/NAME.jsonl and eval/NAME.jsonl.

    Raises:
        FileNotFoundError, DataError: a file cannot be read or fetched, a set has no usable record, two sets of a split
            have one name, or more questions are to be held out than there are.
    """
    _check(wanted)
    train = [_read(source, "train", wanted.root) for source in wanted.train]
    evaluation = [_read(source, "eval", wanted.root) for source in wanted.evaluation]
    further = [_read(source, "eval", wanted.root) for source in wanted.against]
    _decontaminate(train, [*evaluation, *further], wanted.near)
    _drop_repetitions(train)
    counts = wanted.held_out
    held_out = [_hold_out(found, counts[found.name], wanted.seed) for found in train if found.name in counts]
    _decontaminate(train, held_out, wanted.near)
    evaluation += held_out
    for found in [*train, *evaluation]:
        found.path = folder / found.split / f"{found.name}.jsonl"
        _write(found.path, found.kept)
    return [*train, *evaluation]


def _check(wanted: Preparation) -> None:
    for sources in (wanted.train, wanted.evaluation):
        names = [source.name for source in sources]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise DataError(f"{', '.join(repeated)}: named twice; give all files at once, NAME=FILE,FILE")
    for name in wanted.held_out:
        if name not in {source.name for source in wanted.train}:
            raise DataError(f"questions of {name} are to be held out, but {name} is not among the training sets")
        if name in {source.name for source in wanted.evaluation}:
            raise DataError(f"{name} has evaluation questions of its own; hold none out, or leave those away")


def _read(source: SetSource, split: Split, root: Path) -> PreparedSet:
    """Read a set. Records without question or answer are left out and counted."""
    found = PreparedSet(source.name, split)
    usable: list[tuple[str, PreparedQuestion]] = []
    for path in locate(source, split, root):
        for record in read_records(path):
            found.read += 1
            try:
                question = replace(read_question(record, source_name(path)), source=source.name, record={}, messages=())
                facts = tuple(supporting_facts(record))
                paragraphs = tuple(p for p in paragraphs_of(record) if isinstance(p.text, str) and p.text.strip())
                usable.append((path.name, PreparedQuestion(question, paragraphs, facts)))
            except DataError as error:
                found.unusable.append(str(error))
    if not usable:
        raise DataError(f"{source.name}: no record can be used; the first: {found.unusable[0]}")
    ids = distinct_ids([(name, one.question.id) for name, one in usable])
    pairs = zip(ids, usable, strict=True)
    found.kept = [replace(one, question=replace(one.question, id=new)) for new, (_, one) in pairs]
    return found


def _drop_repetitions(sets: Iterable[PreparedSet]) -> None:
    """Keep of questions that are the same after normalisation the first, over all sets."""
    seen: set[str] = set()
    for found in sets:
        first = []
        for one in found.kept:
            key = normalise_question(one.question.text)
            if key not in seen:
                first.append(one)
            seen.add(key)
        found.repeated = len(found.kept) - len(first)
        found.kept = first


def _hold_out(found: PreparedSet, count: int, seed: int) -> PreparedSet:
    """Take `count` questions out of a training set, drawn by the seed; return them as an evaluation set."""
    if not 0 < count < len(found.kept):
        raise DataError(f"{found.name} has {len(found.kept)} questions, of which {count} cannot be held out")
    drawn = set(random.Random(f"{seed}:{found.name}").sample(range(len(found.kept)), count))
    held_out = PreparedSet(found.name, "eval", read=count)
    held_out.kept = [one for i, one in enumerate(found.kept) if i in drawn]
    found.kept = [one for i, one in enumerate(found.kept) if i not in drawn]
    found.held_out = count
    return held_out


def _decontaminate(train: Sequence[PreparedSet], evaluation: Sequence[PreparedSet], near: float | None) -> None:
    """Take the questions that an evaluation asks out of training sets. Words are as rare as they are in all sets."""
    protected: dict[str, list[str]] = {}
    for found in evaluation:
        protected.setdefault(found.name, []).extend(one.question.text for one in found.kept)
    overlaps = iter(find_overlaps([one.question.text for found in train for one in found.kept], protected, near))
    for found in train:
        pairs = [(one, next(overlaps)) for one in found.kept]
        found.overlaps += [(one.question, overlap) for one, overlap in pairs if overlap is not None]
        found.kept = [one for one, overlap in pairs if overlap is None]


def _write(path: Path, questions: Iterable[PreparedQuestion]) -> None:
    with replacing(path) as partial:
        append_records(partial, map(_row, questions))


def _row(one: PreparedQuestion) -> dict[str, Any]:
    question = one.question
    row: dict[str, Any] = {
        "id": question.id,
        "question": question.text,
        "golden_answers": list(question.answers),
        "data_source": question.source,
    }
    row |= {key: question.meta[key] for key in ("type", "level") if key in question.meta}
    if one.paragraphs:
        row["paragraphs"] = [
            {"title": p.title, "paragraph_text": p.text, "is_supporting": p.is_evidence} for p in one.paragraphs
        ]
    if one.facts:
        row["supporting_facts"] = [list(fact) for fact in one.facts]
    return row
