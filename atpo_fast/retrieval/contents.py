"""The text of a document, under whichever of the common names it stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from atpo_fast.common.errors import DataError

TEXT_FIELDS = (
    "contents",
    "text",
    "content",
    "passage",
    "passage_text",
    "page_content",
    "paragraph",
    "paragraph_text",
    "body",
    "chunk",
    "snippet",
)
"""Names of fields with a document's text; the first that holds a text counts."""

_NESTS = ("document", "doc", "passage", "_source", "payload", "node", "entity", "fields", "metadata")
_DEPTH = 4  # of objects in each other
_MOST_NAMED = 12


def document_contents(document: Any) -> str:
    """Return the text of a document: `contents`, or else `title` in quotes, newline, text. A title may be missing.

    The text is a string, or a list of them, in one of `TEXT_FIELDS`, of the document itself or of an object in it
    (`{"document": {...}}`, `{"_source": {...}}`). A document that is a string is its text.

    Raises:
        DataError: no text; names the fields that were found and those that are read.
    """
    text = _text_of(document, "", _DEPTH)
    if text is None:
        found = list(_fields(document, "", _DEPTH))
        named = ", ".join([*found[:_MOST_NAMED], *(["..."] if len(found) > _MOST_NAMED else [])])
        what = f"the fields {named}" if found else f"a {type(document).__name__} without fields"
        raise DataError(f"no text in a document: found {what}; expected one of {', '.join(TEXT_FIELDS)}")
    return text


def _text_of(document: Any, title: str, depth: int) -> str | None:
    """Return the text of a document with its title, or None where it has no text."""
    if isinstance(document, str):
        return document
    if not isinstance(document, dict) or not depth:
        return None
    title = str(document.get("title") or title)
    if "document" in document and (text := _text_of(document["document"], title, depth - 1)) is not None:
        return text  # what stands beside it is about the search
    for name in TEXT_FIELDS:
        text = _plain(document.get(name))
        if text is not None:
            return text if name == "contents" or not title else f'"{title}"\n{text}'
    nests = (document[name] for name in _NESTS if isinstance(document.get(name), dict))
    return next((text for nest in nests if (text := _text_of(nest, title, depth - 1)) is not None), None)


def _plain(value: Any) -> str | None:
    """Return the text that a field holds, if any: a string, a number, or a list of strings joined."""
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return " ".join(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return str(value)


def _fields(document: Any, path: str, depth: int) -> Iterator[str]:
    """Yield the names of a document's fields, those of objects in it by their paths; null is said."""
    if not isinstance(document, dict) or not depth:
        return
    for name, value in document.items():
        if isinstance(value, dict) and value:
            yield from _fields(value, f"{path}{name}.", depth - 1)
        else:
            yield f"{path}{name}{' (null)' if value is None else ''}"
