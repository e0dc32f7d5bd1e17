"""What a record says: its question, chat, answers, name and source, whatever its columns are called.

`ColumnsConfig` (`data.columns`) names columns; those it leaves out are recognised by the names that data sets use.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from atpo_fast.common.errors import DataError
from atpo_fast.config import ColumnsConfig
from atpo_fast.data.matching import normalise_answer
from atpo_fast.data.questions import Message, content_of
from atpo_fast.data.records import Record

QUESTION_NAMES = ("question", "problem")
CHAT_NAMES = ("prompt", "messages")
ANSWER_NAMES = (
    "golden_answers",
    "answers",
    "answer",
    "reward_model.ground_truth",
    "possible_answers",
    "ground_truth",
    "solution",
)
ID_NAMES = ("id", "_id", "qid", "idx", "question_id", "QuestionId", "extra_info.index")
PARAGRAPH_FIELDS = ("context", "paragraphs", "ctxs")
"""Columns that hold the paragraphs of a question."""

Messages = tuple[Message, ...]

_ALIAS_SEPARATOR = "<|answer_split|>"
_AFTER_HASHES = re.compile(r"^####[ \t]*(\S.*)$", re.MULTILINE)
_GROUPED_DIGITS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_NUMBER = re.compile(r"[-+$]*[\d,]+(?:\.\d+)?%?")


def question_of(record: Record, columns: ColumnsConfig) -> tuple[str, Messages]:
    """Return the text of a record's question, stripped, and its chat prompt where it has one.

    The text of a column of questions ends in "?" (the published clean-up); that of a chat, a plain prompt or a problem
    stays as it is.

    Raises:
        DataError: the record has no question; the message lists its columns.
    """
    value, named = record.value, columns.question
    chats = CHAT_NAMES if named is None else (named, *CHAT_NAMES)
    chat = next((messages for name in chats if (messages := _messages(_column(value, name)))), ())
    own = QUESTION_NAMES if named is None else (named,)
    text = next((found for name in own if (found := _plain_text(value, name))), None)
    if text is not None:
        return (text.strip() if named is None and _column(value, "question") is None else clean_question(text)), chat
    if named is None or _messages(_column(value, named)):
        prompts = (_plain_text(value, name) for name in CHAT_NAMES)
        text = _last_question(chat) if chat else next(filter(None, prompts), None)
    if text is None or not text.strip():
        wanted = (
            "non-empty text in the field question, or a chat in prompt or messages"
            if named is None
            else f"non-empty text or a chat in the field {named} (data.columns.question)"
        )
        raise DataError(f"{record.where}: no question; expected {wanted}; {_columns_found(value, 'question')}")
    return text.strip(), chat


def clean_question(text: str) -> str:
    """Strip a question and end it with a question mark (the published clean-up)."""
    text = text.strip()
    return text if text.endswith("?") else f"{text}?"


def answers_of(record: Record, columns: ColumnsConfig) -> tuple[str, ...]:
    """Return the accepted answers of a record, without repetitions.

    Whole numbers that became floats are whole numbers again. Of a worked solution only its result counts: what follows
    `####` (GSM8K), or what the last `\\boxed{...}` holds.

    Raises:
        DataError: the record has no answer; the message lists its columns.
    """
    value = record.value
    names = ANSWER_NAMES if columns.answers is None else (columns.answers,)
    field = next((name for name in names if _column(value, name) is not None), None)
    if field is None:
        asked = (
            f"one of the fields {', '.join(ANSWER_NAMES)}"
            if columns.answers is None
            else f"the field {columns.answers} (data.columns.answers)"
        )
        raise DataError(f"{record.where}: no answer; expected {asked}; {_columns_found(value, 'answers')}")
    found = _texts(_column(value, field), record, field)
    if field == "answer":
        found += _texts(_column(value, "answer_aliases") or [], record, "answer_aliases")
    answers = tuple(dict.fromkeys(text for text in map(_result, found) if text))
    if not answers:
        raise DataError(f"{record.where}: the field {field} holds no answer; expected at least one non-empty text")
    return answers


def identity_of(record: Record, columns: ColumnsConfig, source: str) -> str:
    """Return the name of a record: its own, else one of its file and number.

    Raises:
        DataError: `data.columns.id` names a column that the record lacks.
    """
    names = ID_NAMES if columns.id is None else (columns.id,)
    found = next((found for name in names if (found := _column(record.value, name)) is not None), None)
    if found is None and columns.id is not None:
        raise DataError(
            f"{record.where}: no id; expected the field {columns.id} (data.columns.id); "
            f"{_columns_found(record.value, 'id')}"
        )
    return f"{source}-{record.number}" if found is None else _scalar(found)


def source_of(record: Record, columns: ColumnsConfig, source: str) -> str:
    """Return the data set that a record comes from: what it says itself, else `source`."""
    found = _column(record.value, columns.source or "data_source")
    return source if found is None else _scalar(found)


def columns_without_paragraphs(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a record as they stand, but for those that hold paragraphs."""
    kept = {name: column for name, column in value.items() if name not in PARAGRAPH_FIELDS}
    metadata = kept.get("metadata")
    if isinstance(metadata, dict):
        kept["metadata"] = {name: column for name, column in metadata.items() if name not in PARAGRAPH_FIELDS}
    return kept


def normalises_to_nothing(answer: str) -> bool:
    """Tell whether the published normalisation leaves nothing of an answer, such as "The The" or "!!!"."""
    return not normalise_answer(answer)


def in_json(value: Any) -> Any:
    """Return what a text holds as JSON, where it holds an array or an object; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _column(value: Mapping[str, Any], name: str) -> Any:
    """Return a column by its name, also in other capitals; a name with dots reaches inside. None: not there, or NaN."""
    if name not in value:
        other = next((key for key in value if str(key).lower() == name.lower()), None)
        if other is None:
            outer, dot, inner = name.partition(".")
            inside = value.get(outer) if dot else None
            return _column(inside, inner) if isinstance(inside, Mapping) else None
        name = other
    found = value[name]
    return None if isinstance(found, float) and math.isnan(found) else found


def _columns_found(value: Mapping[str, Any], key: str) -> str:
    """Say which columns there are, and how to name the right one."""
    return f"found the columns {', '.join(map(str, value)) or 'none'}; name the right one with data.columns.{key}"


def _messages(prompt: Any) -> Messages | None:
    """Return a chat without what answers it; None for what is no chat. Keys that are null, as Parquet fills them in,
    are left out."""
    prompt = in_json(prompt)
    if not isinstance(prompt, Sequence) or isinstance(prompt, str) or not prompt:
        return None
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in prompt):
        return None
    chat = [{key: part for key, part in m.items() if part is not None or key == "content"} for m in prompt]
    last = max((i for i, message in enumerate(chat) if message["role"] != "assistant"), default=-1)
    return tuple(chat[: last + 1])


def _plain_text(value: Mapping[str, Any], name: str) -> str | None:
    """Return the text of a column; None for one that is blank, holds a chat, or is not there."""
    text = _column(value, name)
    return text if isinstance(text, str) and text.strip() and not _messages(text) else None


def _last_question(chat: Messages) -> str | None:
    """Return the last user message, or, as AT2PO writes it, what follows the line "user" of a lone system message."""
    users = [content_of(message) for message in chat if message["role"] == "user"]
    if users:
        return users[-1]
    content = content_of(chat[-1]) if chat else ""
    return content.rpartition("\nuser\n")[2] if "\nuser\n" in content else None


def _texts(value: Any, record: Record, field: str) -> list[str]:
    """Convert a text, number, truth value, a list of them, or an object that holds some, to stripped texts."""
    if isinstance(value, str):
        listed = in_json(value) if field.endswith("possible_answers") else value  # PopQA: JSON in a text
        if isinstance(listed, list):
            return _texts(listed, record, field)
        return [alias.strip() for alias in value.split(_ALIAS_SEPARATOR)]
    if isinstance(value, bool | int | float):
        return [] if isinstance(value, float) and math.isnan(value) else [_scalar(value)]
    if isinstance(value, Sequence):
        return [text for entry in value for text in _texts(entry, record, field)]
    if isinstance(value, Mapping):  # {target: ...} in verl's rows; {value, aliases} in TriviaQA
        inside = [found for name in ("target", "value", "aliases") if (found := _column(value, name)) is not None]
        if inside:
            return [text for found in inside for text in _texts(found, record, field)]
    raise DataError(f"{record.where}: the field {field} is {type(value).__name__}; expected text or a list of texts")


def _scalar(value: Any) -> str:
    """Write a value as text: truth values as yes and no, whole floats without their zero."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _result(text: str) -> str:
    """Return the result of a worked solution; any other text as it is."""
    after_hashes = _AFTER_HASHES.findall(text)
    if after_hashes:
        result = str(after_hashes[-1]).rstrip()
        return _GROUPED_DIGITS.sub("", result) if _NUMBER.fullmatch(result) else result
    boxed = _last_box(text) if "\\boxed{" in text else None
    return text if boxed is None else boxed.strip()


def _last_box(text: str) -> str | None:
    """Return what the last `\\boxed{...}` that is closed holds, of nested ones the outer; None when none is closed."""
    found: tuple[int, int] | None = None
    opened: list[int] = []  # for each open brace, where the content of its box begins; 0: it is no box's
    for brace in re.finditer(r"[{}]", text):
        place = brace.start()
        if brace.group() == "{":
            opened.append(place + 1 if text.endswith("\\boxed", 0, place) else 0)
        elif opened and (start := opened.pop()):
            found = start, place
    return None if found is None else text[found[0] : found[1]]
