"""Questions with their answers, and the passages that answer them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question to roll out, with its accepted answers."""

    id: str
    text: str
    answers: tuple[str, ...]  # accepted answers; at least one
    source: str = ""  # data set that the question comes from
    meta: dict[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()  # chat prompt of the record, as it stands there (verl, TRL); none: empty
    record: dict[str, Any] = field(default_factory=dict)  # columns of the record, as they stand there, for rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A passage of a search corpus."""

    id: str
    title: str
    text: str

    @property
    def contents(self) -> str:
        """Passage in the wiki-18 layout: title in quotes, newline, text; without a title only the text."""
        return f'"{self.title}"\n{self.text}' if self.title else self.text


def content_of(message: Message) -> str:
    """Return the text of a message, whose content may be a list of parts.

    Parts follow each other with nothing in between, as chat templates write them; what is no text (an image) is left
    out, and so is a text that is null, as Parquet fills it in.
    """
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return "" if content is None else str(content)
