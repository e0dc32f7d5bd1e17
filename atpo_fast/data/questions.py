"""Questions with their answers, and the passages that answer them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question to roll out."""

    id: str
    text: str
    answers: tuple[str, ...]  # accepted answers; at least one
    source: str = ""  # data set it came from
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """One passage of a search corpus."""

    id: str
    title: str
    text: str

    @property
    def contents(self) -> str:
        """The wiki-18 layout: title in quotes, newline, text. A passage without a title is its text alone."""
        return f'"{self.title}"\n{self.text}' if self.title else self.text
