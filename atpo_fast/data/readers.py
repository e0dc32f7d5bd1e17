"""Read questions and passages from data files, whatever the layout (`fields.py` and `paragraphs.py` know the layouts).

Passages: `contents` (wiki-18: title in quotes, newline, text), `title` and `text`, or the paragraphs of question files.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atpo_fast.common.errors import DataError
from atpo_fast.config import ColumnsConfig, DataConfig
from atpo_fast.data.fields import (
    PARAGRAPH_FIELDS,
    answers_of,
    columns_without_paragraphs,
    identity_of,
    normalises_to_nothing,
    question_of,
    source_of,
)
from atpo_fast.data.paragraphs import evidence_titles, paragraphs_of
from atpo_fast.data.questions import Passage, Question
from atpo_fast.data.records import Record, read_records

_LOG = logging.getLogger(__name__)
_SPLITS = ("train", "dev", "validation", "val", "test", "data")
_ANY_COLUMNS = ColumnsConfig()
_SLICE = re.compile(r"(.*)\[(\d*):(\d*)\]")


def read_questions(path: str | Path, columns: ColumnsConfig = _ANY_COLUMNS) -> list[Question]:
    """Read the questions of a file, or of a folder that `datasets` saved, with their chats and records.

    The columns are those that `columns` names, else recognised (`fields.py`). A question that does not say which data
    set it comes from takes the file's name, or its folder's where the file is named after a split (`nq/test.jsonl`).

    A path may end in a slice of Python, `train.json[:70]` or `train.json.gz[70:]`: only these questions of the file.

    Raises:
        FileNotFoundError: the file does not exist.
        DataError: the file is unreadable, or a record has no question or no answer; names file, record and field.
    """
    path, wanted = _split_slice(path)
    source = source_name(path)
    questions = [read_question(record, source, columns) for record in read_records(path)[wanted]]
    _warn_of_blank_answers(path, questions)
    return questions


def data_roots(data: DataConfig) -> list[Path]:
    """Return the folders that data files are looked up in: the environment variable ATPO_DATA's, then `data.root`."""
    return [Path(root) for root in (os.environ.get("ATPO_DATA"), data.root) if root]


def find_file(roots: Sequence[Path], name: str) -> Path:
    """Return the path of a data file in the first folder that has it, a slice at its end included.

    Raises FileNotFoundError, which names all folders, when none has it.
    """
    places = [root / name for root in roots]
    found = next((place for place in places if _split_slice(place)[0].exists()), None)
    if found is None:
        looked = " nor ".join(str(_split_slice(place)[0]) for place in places)
        raise FileNotFoundError(
            f"data file {looked} does not exist (files are relative to data.root, or to the folder in ATPO_DATA)"
        )
    return found


def read_question_files(
    roots: Sequence[Path], names: Iterable[str], columns: ColumnsConfig = _ANY_COLUMNS
) -> list[Question]:
    """Read the questions of several files in `roots`, in which no two questions have the same id.

    Ids that stand more than once, in one file or in several, are told apart by their file: `nq/test:17`, and if that
    is not enough by their number there, `nq/test:17#2`.

    Raises:
        FileNotFoundError, DataError: as `read_questions`.
    """
    found = [(name, question) for name in names for question in read_questions(find_file(roots, name), columns)]
    ids = distinct_ids([(name, question.id) for name, question in found])
    return [replace(question, id=new) for new, (_, question) in zip(ids, found, strict=True)]


def distinct_ids(found: Sequence[tuple[str, str]]) -> list[str]:
    """Return an id for each (file name, id), of which none is twice (see `read_question_files`)."""
    uses = Counter(given for _, given in found)
    taken: Counter[str] = Counter()
    ids = []
    for name, given in found:
        told_apart = f"{_without_suffixes(name)}:{given}" if uses[given] > 1 else given
        taken[told_apart] += 1
        ids.append(told_apart if taken[told_apart] == 1 else f"{told_apart}#{taken[told_apart]}")
    return ids


def read_question(record: Record, source: str, columns: ColumnsConfig = _ANY_COLUMNS) -> Question:
    """Return the question of a record from a file of the data set `source`.

    Raises:
        DataError: the record has no question or no answer.
    """
    text, messages = question_of(record, columns)
    return Question(
        id=identity_of(record, columns, source),
        text=text,
        answers=answers_of(record, columns),
        source=source_of(record, columns, source),
        meta=_meta(record),
        messages=messages,
        record=columns_without_paragraphs(record.value),
    )


def read_passages(path: str | Path) -> list[Passage]:
    """Read the passages of a corpus, or the paragraphs of a question file; repeated ones (title and text) once.

    Records of a question file may lack paragraphs as long as some record has them.

    Raises:
        FileNotFoundError: the file does not exist.
        DataError: the file is unreadable or has no passage, or a passage has no text.
    """
    path, _ = _split_slice(path)  # passages are those of the whole file
    source = source_name(path)
    passages = distinct_passages([passage for record in read_records(path) for passage in _passages(record, source)])
    if not passages:
        raise DataError(
            f"{path}: no passages found; expected the fields contents, or title and text, or paragraphs in one of "
            f"{', '.join(PARAGRAPH_FIELDS)}"
        )
    return passages


def distinct_passages(passages: list[Passage]) -> list[Passage]:
    """Drop later repetitions of a title and text; the order stays."""
    distinct: dict[tuple[str, str], Passage] = {}
    for passage in passages:
        distinct.setdefault((passage.title, passage.text), passage)
    return list(distinct.values())


def _split_slice(path: str | Path) -> tuple[Path, slice]:
    """Split "train.json[:70]" into the path of the file and the slice; without one, all of it."""
    found = _SLICE.fullmatch(str(path))
    if found is None:
        return Path(path), slice(None)
    return Path(found[1]), slice(*(int(number) if number else None for number in found.group(2, 3)))


def source_name(path: str | Path) -> str:
    """Return the name of a file without its suffixes, or its folder's where the file is named after a split."""
    path = Path(path)
    stem = path.name.split(".")[0]
    return path.parent.name if stem.lower() in _SPLITS and path.parent.name else stem


def _meta(record: Record) -> dict[str, Any]:
    """Collect type and level where given, and the titles of the paragraphs that hold the evidence."""
    value = record.value
    meta: dict[str, Any] = {key: value[key] for key in ("type", "level") if isinstance(value.get(key), str)}
    titles = evidence_titles(record)
    if titles:
        meta["evidence_titles"] = titles
    return meta


def _warn_of_blank_answers(path: str | Path, questions: Sequence[Question]) -> None:
    blank = [question for question in questions if all(map(normalises_to_nothing, question.answers))]
    if blank:
        _LOG.warning(
            "%s: of the answers to %d of %d questions nothing is left once they are normalised, the first being %r to "
            "question %r: exact match accepts for them any answer of which nothing is left either, and F1 is 0",
            path,
            len(blank),
            len(questions),
            blank[0].answers[0],
            blank[0].id,
        )


def _passages(record: Record, source: str) -> Iterator[Passage]:
    value = record.value
    name = identity_of(record, _ANY_COLUMNS, source)
    if isinstance(value.get("contents"), str):
        title, text = _split_contents(value["contents"])
        yield _passage(record, name, title, text, "contents")
    elif "text" in value:
        yield _passage(record, name, value.get("title"), value["text"], "text")
    else:
        for i, paragraph in enumerate(paragraphs_of(record)):
            yield _passage(record, f"{name}:{i}", paragraph.title, paragraph.text, paragraph.where)


def _split_contents(contents: str) -> tuple[str, str]:
    """Split a passage of the wiki-18 layout into title and text; without a quoted first line, all of it is text."""
    title, newline, text = contents.partition("\n")
    if newline and len(title) >= 2 and title.startswith('"') and title.endswith('"'):
        return title[1:-1], text
    return "", contents


def _passage(record: Record, name: str, title: Any, text: Any, field: str) -> Passage:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{record.where}: the passage in {field} has no text")
    return Passage(id=name, title=str(title or "").strip(), text=text.strip())


def _without_suffixes(name: str) -> str:
    path = Path(name)
    return str(path.with_name(path.name.split(".")[0]))
