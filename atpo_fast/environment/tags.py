"""The text protocol between policy and tools: calls are tagged text, results come back between result tags.

A call is `<tool>argument</tool>`, written by the policy; the closing tag ends the turn. The environment answers inside
the same assistant message with ` <result>`, a newline, the text, a newline and `</result>` (the published protocol).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TagVocabulary:
    """Names of the tags that are not tools; a tool's tag is the tool's name."""

    think: str = "think"
    answer: str = "answer"
    result: str = "result"


TAGS = TagVocabulary()

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
    """`<name>`."""
    return f"<{name}>"


def close_tag(name: str) -> str:
    """`</name>`: for a tool, also the stop string of its call."""
    return f"</{name}>"


def parse_call(text: str, tools: Sequence[str]) -> ToolCall | None:
    """The last call in `text`: of all tags in `tools`, the pair that closes last; None when no tag closes.

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
    """What precedes a result's text."""
    return f" {open_tag(TAGS.result)}\n"


def result_closing() -> str:
    """What follows a result's text."""
    return f"\n{close_tag(TAGS.result)}"


def format_result(text: str) -> str:
    """The observation that carries a tool's result."""
    return f"{result_opening()}{text}{result_closing()}"
