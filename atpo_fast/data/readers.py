"""Read questions and passages from data files, whatever the layout.

Questions: `question` or a chat `prompt` (the last user message; or, as AT2PO writes it, what follows the line "user" of
a lone system message). Answers, the first field that exists: `golden_answers` (FlashRAG), `answers`, `answer` (with
MuSiQue's `answer_aliases`), `reward_model.ground_truth` (verl, ARPO: a string, aliases joined by `<|answer_split|>`, a
list, or `{target: ...}`).

Passages: `contents` (wiki-18: title in quotes, newline, text), `title` and `text`, or the paragraphs of question files:
`context` (HotpotQA, 2Wiki), `paragraphs` (MuSiQue), `ctxs`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atpo_fast.common.errors import DataError
from atpo_fast.data.questions import Passage, Question
from atpo_fast.data.records import Record, read_records

_ALIAS_SEPARATOR = "<|answer_split|>"
_ID_FIELDS = ("id", "_id", "qid", "idx")
_PARAGRAPH_FIELDS = ("context", "paragraphs", "ctxs")
_SLICE = re.compile(r"(.*)\[(\d*):(\d*)\]")


def read_questions(path: str | Path) -> list[Question]:
    """Read the questions of a file. Their text is stripped and ends in "?".

    A path may end in a slice of Python, `train.json[:70]` or `train.json.gz[70:]`: only these questions of the file.

    Raises:
        FileNotFoundError: the file does not exist.
        DataError: the file is unreadable, or a record has no question or no answer; names file, record and field.
    """
    path, wanted = _split_slice(path)
    source = _stem(path)
    return [_question(record, source) for record in read_records(path)[wanted]]


def read_passages(path: str | Path) -> list[Passage]:
    """Read the passages of a corpus, or the paragraphs of a question file; repeated ones (title and text) once.

    Records of a question file may lack paragraphs as long as some record has them.

    Raises:
        FileNotFoundError: the file does not exist.
        DataError: the file is unreadable or has no passage, or a passage has no text.
    """
    path, _ = _split_slice(path)  # passages are those of the whole file
    source = _stem(path)
    passages = distinct_passages([passage for record in read_records(path) for passage in _passages(record, source)])
    if not passages:
        raise DataError(
            f"{path}: no passages found; expected the fields contents, or title and text, or paragraphs in one of "
            f"{', '.join(_PARAGRAPH_FIELDS)}"
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


def clean_question(text: str) -> str:
    """Strip a question and end it with a question mark (the published clean-up)."""
    text = text.strip()
    return text if text.endswith("?") else f"{text}?"


def _question(record: Record, source: str) -> Question:
    value = record.value
    return Question(
        id=_identity(record, source),
        text=clean_question(_question_text(record)),
        answers=_answers(record),
        source=str(value.get("data_source") or source),
        meta=_meta(value),
    )


def _meta(value: dict[str, Any]) -> dict[str, Any]:
    """Collect type and level where given, and the titles of the paragraphs that hold the evidence."""
    meta: dict[str, Any] = {key: value[key] for key in ("type", "level") if isinstance(value.get(key), str)}
    facts, paragraphs = value.get("supporting_facts"), value.get("paragraphs")
    titles: list[Any] = []
    if isinstance(facts, list):  # HotpotQA, 2Wiki: [title, number of the sentence]
        titles = [fact[0] for fact in facts if isinstance(fact, list) and fact]
    elif isinstance(paragraphs, list):  # MuSiQue
        titles = [p.get("title") for p in paragraphs if isinstance(p, dict) and p.get("is_supporting")]
    if titles:
        meta["evidence_titles"] = list(dict.fromkeys(str(title) for title in titles))
    return meta


def _question_text(record: Record) -> str:
    value = record.value
    text = value.get("question")
    if text is None and "prompt" in value:
        text = _prompt_question(value["prompt"])
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{record.where}: no question; expected non-empty text in the field question, or a chat in prompt"
        )
    return text


def _prompt_question(prompt: Any) -> str | None:
    """Return the question in a chat prompt, or None."""
    if isinstance(prompt, str):
        return prompt
    messages = [m for m in prompt if isinstance(m, dict)] if isinstance(prompt, list) else []
    users = [m.get("content") for m in messages if m.get("role") == "user"]
    if users:
        return users[-1]
    content = messages[-1].get("content") if messages else None
    return content.rpartition("\nuser\n")[2] if isinstance(content, str) and "\nuser\n" in content else None


def _answers(record: Record) -> tuple[str, ...]:
    value = record.value
    field = next((name for name in ("golden_answers", "answers", "answer") if value.get(name) is not None), None)
    if field is not None:
        found = _texts(value[field], record, field)
    elif isinstance(value.get("reward_model"), dict) and value["reward_model"].get("ground_truth") is not None:
        field = "reward_model.ground_truth"
        truth = value["reward_model"]["ground_truth"]
        found = _texts(truth.get("target") if isinstance(truth, dict) else truth, record, field)
        found = [alias.strip() for text in found for alias in text.split(_ALIAS_SEPARATOR)]
    else:
        raise DataError(
            f"{record.where}: no answer; expected one of the fields golden_answers, answers, answer, "
            "reward_model.ground_truth"
        )
    if field == "answer":
        found += _texts(value.get("answer_aliases") or [], record, "answer_aliases")
    answers = tuple(dict.fromkeys(text for text in found if text))
    if not answers:
        raise DataError(f"{record.where}: the field {field} holds no answer; expected at least one non-empty text")
    return answers


def _texts(value: Any, record: Record, field: str) -> list[str]:
    """Convert a text, number, truth value or list of them to stripped texts."""
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, str | int | float):
        return [str(value).strip()]
    if isinstance(value, list):
        return [text for entry in value for text in _texts(entry, record, field)]
    raise DataError(f"{record.where}: the field {field} is {type(value).__name__}; expected text or a list of texts")


def _identity(record: Record, source: str) -> str:
    value = record.value
    extra = value.get("extra_info")
    index = extra.get("index") if isinstance(extra, dict) else None
    found = next((value[name] for name in _ID_FIELDS if value.get(name) is not None), index)
    return f"{source}-{record.number}" if found is None else str(found)


def _passages(record: Record, source: str) -> Iterator[Passage]:
    value = record.value
    name = _identity(record, source)
    if isinstance(value.get("contents"), str):
        title, text = _split_contents(value["contents"])
        yield _passage(record, name, title, text, "contents")
    elif "text" in value:
        yield _passage(record, name, value.get("title"), value["text"], "text")
    else:
        field = next((field for field in _PARAGRAPH_FIELDS if value.get(field)), None)
        for i, (title, text) in enumerate(_paragraphs(record, field) if field else []):
            yield _passage(record, f"{name}:{i}", title, text, f"{field}[{i}]")


def _split_contents(contents: str) -> tuple[str, str]:
    """Split a passage of the wiki-18 layout into title and text; without a quoted first line, all of it is text."""
    title, newline, text = contents.partition("\n")
    if newline and len(title) >= 2 and title.startswith('"') and title.endswith('"'):
        return title[1:-1], text
    return "", contents


def _paragraphs(record: Record, field: str) -> Iterator[tuple[Any, Any]]:
    """Yield (title, text) of each paragraph in a question record."""
    entries = record.value[field]
    if isinstance(entries, dict):  # HotpotQA as parquet holds columns instead of pairs
        entries = list(zip(entries.get("title", []), entries.get("sentences", []), strict=False))
    if not isinstance(entries, list):
        raise DataError(f"{record.where}: the field {field} is {type(entries).__name__}; expected a list of paragraphs")
    for i, entry in enumerate(entries):
        if isinstance(entry, dict):
            yield entry.get("title"), entry.get("paragraph_text", entry.get("text"))
        elif isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], list):
            yield entry[0], _join_sentences(entry[1])
        else:
            raise DataError(
                f"{record.where}: {field}[{i}] is not a paragraph; expected [title, [sentences]] or an object"
            )


def _join_sentences(sentences: list[Any]) -> str:
    """Join sentences by one space; some data sets keep the space at the front of each."""
    return " ".join(str(sentence).strip() for sentence in sentences)


def _passage(record: Record, name: str, title: Any, text: Any, field: str) -> Passage:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{record.where}: the passage in {field} has no text")
    return Passage(id=name, title=str(title or "").strip(), text=text.strip())


def _stem(path: str | Path) -> str:
    return Path(path).name.split(".")[0]
