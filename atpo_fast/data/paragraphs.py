"""Paragraphs of question records, and which of them hold the evidence, in the layouts of the data sets.

HotpotQA and 2WikiMultihopQA: `context`, pairs of a title and sentences, with `supporting_facts`, pairs of a title and
the number of a sentence. Hugging Face stores both as columns (`{"title": [...], "sent_id": [...]}`) or as JSON in a
text, and FlashRAG puts them into `metadata`. MuSiQue: `paragraphs` with `is_supporting`. Others: `ctxs` with `isgold`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from atpo_fast.common.errors import DataError
from atpo_fast.data.fields import PARAGRAPH_FIELDS, in_json
from atpo_fast.data.records import Record

Fact = tuple[str, int | None]

_TEXT_NAMES = ("paragraph_text", "text", "sentences", "content")
_EVIDENCE_NAMES = ("is_supporting", "isgold")


@dataclass(frozen=True, slots=True, kw_only=True)
class Paragraph:
    """A paragraph of a question record."""

    where: str  # field and place in it, such as "context[3]"
    title: str
    text: Any  # text, if the record is right
    is_evidence: bool  # whether the record itself marks it as evidence


def paragraphs_of(record: Record) -> list[Paragraph]:
    """Return the paragraphs of a record; none where it has none.

    Raises:
        DataError: what stands there is no list of paragraphs.
    """
    field, entries = _entries(record)
    if field is None:
        return []
    facts = {title for title, _ in _facts(_inside(record.value, "supporting_facts"))}
    return [_paragraph(record, f"{field}[{i}]", entry, facts) for i, entry in enumerate(entries)]


def evidence_titles(record: Record) -> list[str]:
    """Return the titles of the paragraphs that hold the evidence, in the order of the facts; none: not known."""
    return list(dict.fromkeys(title for title, _ in supporting_facts(record)))


def supporting_facts(record: Record) -> list[Fact]:
    """Return the facts that support the answer, in their order: (title, number of the sentence or None)."""
    facts = _facts(_inside(record.value, "supporting_facts"))
    return facts or [(str(entry.get("title")), None) for entry in _marked(record.value)]


def _marked(value: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the paragraphs that are marked as evidence one by one."""
    for field in PARAGRAPH_FIELDS:
        entries = _inside(value, field)
        if isinstance(entries, list):
            found = (entry for entry in entries if isinstance(entry, dict))
            yield from (entry for entry in found if any(entry.get(name) for name in _EVIDENCE_NAMES))


def _inside(value: Mapping[str, Any], name: str) -> Any:
    """Return a column of the record, or of its `metadata`, parsed where it is JSON in a text."""
    metadata = value.get("metadata")
    found = value.get(name)
    if found is None and isinstance(metadata, Mapping):
        found = metadata.get(name)
    return in_json(found)


def _facts(facts: Any) -> list[Fact]:
    """Read supporting facts: pairs [title, sentence], objects with a title, or columns of both."""
    if isinstance(facts, Mapping):
        titles, sentences = facts.get("title"), facts.get("sent_id")
        titles = titles if isinstance(titles, list) else []
        facts = list(zip_longest(titles, sentences if isinstance(sentences, list) else []))[: len(titles)]
    found: list[Fact] = []
    for fact in facts if isinstance(facts, list) else []:
        if isinstance(fact, Mapping):
            fact = fact.get("title"), fact.get("sent_id")
        if isinstance(fact, list | tuple) and fact and fact[0] is not None:
            sentence = fact[1] if len(fact) > 1 else None
            found.append((str(fact[0]), sentence if isinstance(sentence, int) else None))
    return found


def _entries(record: Record) -> tuple[str | None, list[Any]]:
    """Return the field that holds a record's paragraphs, None if no field does, and its entries."""
    field = next((name for name in PARAGRAPH_FIELDS if _inside(record.value, name)), None)
    if field is None:
        return None, []
    entries = _inside(record.value, field)
    if isinstance(entries, Mapping):  # columns in place of a list
        texts = next((entries[name] for name in _TEXT_NAMES if isinstance(entries.get(name), list)), [])
        entries = [list(pair) for pair in zip_longest(entries.get("title", []), texts)]
    if not isinstance(entries, list):
        raise DataError(f"{record.where}: the field {field} is {type(entries).__name__}; expected a list of paragraphs")
    return field, entries


def _paragraph(record: Record, where: str, entry: Any, facts: set[str]) -> Paragraph:
    if isinstance(entry, Mapping):
        title = entry.get("title")
        text = next((entry[name] for name in _TEXT_NAMES if entry.get(name) is not None), None)
        marked = any(entry.get(name) for name in _EVIDENCE_NAMES)
    elif isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], list | str):
        title, text = entry
        marked = False
    else:
        raise DataError(f"{record.where}: {where} is not a paragraph; expected [title, [sentences]] or an object")
    title = str(title or "").strip()
    text = _join_sentences(text) if isinstance(text, list) else text
    return Paragraph(where=where, title=title, text=text, is_evidence=marked or title in facts)


def _join_sentences(sentences: list[Any]) -> str:
    """Join sentences by one space; some data sets keep the space at the front of each."""
    return " ".join(str(sentence).strip() for sentence in sentences)
