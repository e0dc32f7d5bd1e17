"""The text protocol between policy and tools: calls are tagged text, results come back between result tags.

A call is `<tool>argument</tool>`, written by the policy; the closing tag ends the turn. The environment answers inside
the same assistant message with ` <result>`, a newline, the text, a newline and `</result>` (the published protocol).

What a tool answers is data. Before it becomes an observation, the first character of every tag and of every token that
was added to the tokenizer is written as an HTML entity (`&lt;/result>`; `Escaper`), so that no text of a result can end
the result, answer the question, call a tool or end the sequence. All other text is unchanged, and `unescape_tags`
restores the original.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from textwrap import dedent


@dataclass(frozen=True, slots=True)
class TagVocabulary:
    """Names of the tags that are not tools; a tool's tag is the tool's name."""

    think: str = "think"
    answer: str = "answer"
    result: str = "result"


TAGS = TagVocabulary()
_PUBLISHED_TOOLS = ("search", "python")

CALL_LIMIT_NOTICE = (
    " I have reached the tool call limit and cannot make further tool calls. "
    "Let me provide the final answer based on the information I have gathered so far. \n\n"
)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call read from a turn. A `problem` says why it cannot be run; it is then answered with that text."""

    tool: str
    argument: str
    problem: str = ""


def open_tag(name: str) -> str:
    """Return the opening tag `<name>`."""
    return f"<{name}>"


def close_tag(name: str) -> str:
    """Return the closing tag `</name>`; for a tool, that is also the stop string of its call."""
    return f"</{name}>"


def parse_call(text: str, tools: Sequence[str]) -> ToolCall | None:
    """Return the last call in `text`: of all tags in `tools`, the pair that closes last; None when no tag closes.

    The pair starts at the last opening tag before the closing one, so `<search>a<search>b</search>` asks for `b`.
    An argument is stripped, after the indentation that all its lines share. An empty argument or a missing opening tag
    gives a call with a `problem`; its text holds no tag, because it becomes part of the trajectory whose format is
    checked.
    """
    end, tool = max(((text.rfind(close_tag(name)), name) for name in tools), default=(-1, ""))
    if end < 0:
        return None
    start = text.rfind(open_tag(tool), 0, end)
    if start < 0:
        return ToolCall(tool, "", f"Tool({tool}) was not called: its opening tag is missing.")
    argument = dedent(text[start + len(open_tag(tool)) : end]).strip()
    if not argument:
        return ToolCall(tool, "", f"Tool({tool}) was not called: nothing is between its tags.")
    return ToolCall(tool, argument)


def result_opening() -> str:
    """Return the text before a result: the opening tag and a newline."""
    return f" {open_tag(TAGS.result)}\n"


def result_closing() -> str:
    """Return the text after a result: a newline and the closing tag."""
    return f"\n{close_tag(TAGS.result)}"


def escape_tags(text: str, tools: Sequence[str] = (), tokens: Sequence[str] = ()) -> str:
    """Return `text` without a tag: `</result>` becomes `&lt;/result>`.

    What looks escaped already gets one `amp;` more. Linear in the text. Escaped are the opening and closing tags of
    think, answer, result, search, python and `tools`, and the texts of `tokens`. `Escaper` does it for a tokenizer.
    """
    return _reserved(tuple(tools), tuple(tokens)).escape(text)


def format_result(text: str, escape: Callable[[str], str] = escape_tags) -> str:
    """Return the observation that carries a tool's result, which `escape` writes without tags (see `Escaper`)."""
    return f"{result_opening()}{escape(text)}{result_closing()}"


def unescape_tags(text: str, tools: Sequence[str] = (), tokens: Sequence[str] = ()) -> str:
    """Return the text that `escape_tags` was given, with the same `tools` and `tokens`."""
    return _reserved(tuple(tools), tuple(tokens)).unescape(text)


def protocol_tags(tools: Sequence[str] = ()) -> list[str]:
    """Return the opening and closing tags of think, answer, result, search, python and `tools`."""
    names = dict.fromkeys([TAGS.think, TAGS.answer, TAGS.result, *_PUBLISHED_TOOLS, *tools])
    return [tag for name in names for tag in (open_tag(name), close_tag(name))]


class Reserved:
    """The texts that data may not hold: tags, and `tokens` of a tokenizer, but for those that are `allowed`.

    Attributes:
        start: regular expression of their first characters, where the rest follows.
        pattern: the same, compiled.
    """

    def __init__(self, tools: Sequence[str] = (), tokens: Sequence[str] = (), allowed: Collection[str] = ()) -> None:
        rests: dict[str, list[str]] = {}
        for text in dict.fromkeys([*protocol_tags(tools), *filter(None, tokens)]):
            if text not in allowed:
                rests.setdefault(text[0], []).append(re.escape(text[1:]))
        follows = {first: f"(?={'|'.join(rest)})" for first, rest in rests.items()}
        self.start = "|".join(f"{re.escape(first)}{rest}" for first, rest in follows.items()) or "(?!)"
        self.pattern = re.compile(self.start)
        either = [
            f"(?:{re.escape(first)}|&(?:amp;)*{re.escape(as_entity(first)[1:])}){rest}"
            for first, rest in follows.items()
        ]
        self._plain_or_escaped = re.compile("|".join(either) or "(?!)")

    def escape(self, text: str) -> str:
        """Return `text` with the first character of each of them as an entity."""
        return self._plain_or_escaped.sub(_escape, text)

    def unescape(self, text: str) -> str:
        """Return the text that `escape` was given."""
        return self._plain_or_escaped.sub(_unescape, text)


_reserved = lru_cache(maxsize=64)(Reserved)


def as_entity(character: str) -> str:
    """Return a character as an HTML entity; an empty text stays empty."""
    return "&lt;" if character == "<" else f"&#{ord(character)};" if character else ""


def _escape(match: re.Match[str]) -> str:
    return as_entity(match[0]) if len(match[0]) == 1 else f"&amp;{match[0][1:]}"


def _unescape(match: re.Match[str]) -> str:
    if match[0].startswith("&amp;"):
        return f"&{match[0][5:]}"
    return html.unescape(match[0])
