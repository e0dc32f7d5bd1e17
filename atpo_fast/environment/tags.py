"""The text protocol between policy and tools: calls are tagged text, results come back between result tags.

A call is `<tool>argument</tool>`, written by the policy; the closing tag ends the turn. The environment answers inside
the same assistant message with ` <result>`, a newline, the text, a newline and `</result>` (the published protocol).

What a tool answers is data. Before it becomes an observation, the first character of every tag and of every special
token in it is written as an HTML entity (`&lt;/result>`), so that no text of a result can end the result, answer the
question, call a tool or end the sequence. All other text is unchanged, and `unescape_tags` restores the original.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    An argument is stripped. An empty argument or a missing opening tag gives a call with a `problem`; its text holds no
    tag, because it becomes part of the trajectory whose format is checked.
    """
    end, tool = max(((text.rfind(close_tag(name)), name) for name in tools), default=(-1, ""))
    if end < 0:
        return None
    start = text.rfind(open_tag(tool), 0, end)
    if start < 0:
        return ToolCall(tool, "", f"Tool({tool}) was not called: its opening tag is missing.")
    argument = text[start + len(open_tag(tool)) : end].strip()
    if not argument:
        return ToolCall(tool, "", f"Tool({tool}) was not called: nothing is between its tags.")
    return ToolCall(tool, argument)


def result_opening() -> str:
    """Return the text before a result: the opening tag and a newline."""
    return f" {open_tag(TAGS.result)}\n"


def result_closing() -> str:
    """Return the text after a result: a newline and the closing tag."""
    return f"\n{close_tag(TAGS.result)}"


def format_result(text: str, tools: Sequence[str] = (), special_tokens: Sequence[str] = ()) -> str:
    """Return the observation that carries a tool's result, its tags and special tokens escaped (`escape_tags`)."""
    return f"{result_opening()}{escape_tags(text, tools, special_tokens)}{result_closing()}"


def escape_tags(text: str, tools: Sequence[str] = (), special_tokens: Sequence[str] = ()) -> str:
    """Return `text` without a tag: `</result>` becomes `&lt;/result>`.

    What looks escaped already gets one `amp;` more. Linear in the text. Escaped are the opening and closing tags of
    think, answer, result, search, python and `tools`, and the `special_tokens` (of a tokenizer) that start with a sign
    and have three characters or more.
    """
    return _reserved(tuple(tools), tuple(special_tokens)).sub(_escape, text)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the texts of all special tokens of a tokenizer, the named ones first."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def unescape_tags(text: str, tools: Sequence[str] = (), special_tokens: Sequence[str] = ()) -> str:
    """Return the text that `escape_tags` was given, with the same `tools` and `special_tokens`."""
    return _reserved(tuple(tools), tuple(special_tokens)).sub(_unescape, text)


@lru_cache(maxsize=64)
def _reserved(tools: tuple[str, ...], special_tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern of the first character, plain or escaped, of every text that a result may not hold."""
    names = dict.fromkeys([TAGS.think, TAGS.answer, TAGS.result, *_PUBLISHED_TOOLS, *tools])
    texts = [tag for name in names for tag in (open_tag(name), close_tag(name))]
    texts += [token for token in special_tokens if len(token) >= 3 and not (token[0].isalnum() or token[0] in "& \n")]
    rests: dict[str, list[str]] = {}
    for text in texts:
        rests.setdefault(text[0], []).append(re.escape(text[1:]))
    patterns = [
        f"(?:{re.escape(first)}|&(?:amp;)*{re.escape(_entity(first)[1:])})(?={'|'.join(rest)})"
        for first, rest in rests.items()
    ]
    return re.compile("|".join(patterns))


def _entity(character: str) -> str:
    return "&lt;" if character == "<" else f"&#{ord(character)};"


def _escape(match: re.Match[str]) -> str:
    return _entity(match[0]) if len(match[0]) == 1 else f"&amp;{match[0][1:]}"


def _unescape(match: re.Match[str]) -> str:
    if match[0].startswith("&amp;"):
        return f"&{match[0][5:]}"
    return html.unescape(match[0])
