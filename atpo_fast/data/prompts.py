"""Prompts: templates of messages, into which a question and the descriptions of tools are filled.

`published` says, in our own words, what the system message of the AT2PO data says, in the same order, and keeps its
layout: one system message that ends in a newline, the word "user", a newline and the question. One difference is
deliberate: the published text was written in a non-raw string, so its models were shown a backspace character followed
by "oxed{...}" where a backslash was meant, while the reward asks for a real `\\boxed{`. Here it is a real backslash.

`short` is the bare question and a newline, for small models trained from scratch. `messages` is the chat of the data's
own record.

Tools beyond the published ones are described in all (`ToolDescriptions`): through the chat template where it shows
tools, else in words. The words stand where a template says `{tools}`, else at the end of the system message, or before
the user message where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from atpo_fast.common.choices import PromptKind
from atpo_fast.common.errors import ConfigError, DataError
from atpo_fast.data.questions import Message, Question, content_of

SYSTEM_PROMPT = (
    "You are a helpful assistant. You solve the question you are given step by step, with the wikipedia search tool to "
    "help you. First think through the reasoning in your mind, then give the answer. While thinking you may call the "
    "search tool for facts about particular topics, as many times as you want. "
    "Put the reasoning between <think> </think> and the answer between <answer> </answer>; put a search query between "
    "<search> </search>, and its result will be between <result> </result>. "
    "For example: <think> the reasoning goes here. </think> <search> the query goes here </search> <result> the search "
    "result appears here </result> <think> more reasoning goes here. </think> <answer> The final answer is "
    r"\[ \boxed{answer here} \] </answer>. "
    r"At the end of the answer, the exact final answer is enclosed within \boxed{} in latex format."
)
QUESTION, TOOLS = "{question}", "{tools}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolDescriptions:
    """Descriptions of tools in a prompt; none by default.

    Attributes:
        text: part of the prompt's own text.
        schemas: schemas for the chat template, in OpenAI's form.
    """

    text: str = ""
    schemas: tuple[dict[str, Any], ...] = ()


NO_TOOLS = ToolDescriptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Templates of a prompt's messages.

    Attributes:
        system: template of the system message; empty: none. Any `{question}` and `{tools}` is filled in, and a line of
            `{tools}` alone vanishes where no tools are described. Other braces are text.
        user: template of the user message, likewise.
        messages: whether the messages are those of the data's record instead, which then needs no templates.
        chat: whether the messages go through the tokenizer's chat template, where it has one.

    Raises:
        ConfigError: there is no place for the question.
    """

    system: str = ""
    user: str = ""
    messages: bool = False
    chat: bool = True

    def __post_init__(self) -> None:
        if self.messages and (self.system or self.user):
            raise ConfigError("a prompt of the record's own messages has no templates")
        if not self.messages and QUESTION not in self.system + self.user:
            raise ConfigError(
                "a prompt lacks the question: write {question} where it belongs, in the system or the user message"
            )

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the messages of a usual question."""
        given = (("system", self.system), ("user", self.user or self.messages))
        return tuple(role for role, template in given if template)

    def fill(self, question: Question, tools: str = "", escape: Callable[[str], str] = str) -> list[Message]:
        """Return the messages of a question's prompt.

        Args:
            question: question to ask.
            tools: description of the tools in words.
            escape: function that is applied to what comes from the data: the question, or the record's messages.

        Raises:
            DataError: the record's messages are asked for, and it has none.
        """
        if self.messages:
            return _own_messages(question, tools, escape)
        system, user = self.system, self.user
        if tools and TOOLS not in system + user:
            system, user = (f"{system}\n{TOOLS}", user) if system else (system, f"{TOOLS}\n{user}")
        texts = {"system": _fill(system, question, tools, escape), "user": _fill(user, question, tools, escape)}
        return [{"role": role, "content": text} for role, text in texts.items() if text]


PROMPTS: Mapping[PromptKind, Prompt] = {
    "published": Prompt(system=f"{SYSTEM_PROMPT}\n{TOOLS}\nuser\n{QUESTION}"),
    "short": Prompt(user=f"{TOOLS}\n{QUESTION}\n", chat=False),
    "messages": Prompt(messages=True),
}
"""Prompts by name."""


def _fill(template: str, question: Question, tools: str, escape: Callable[[str], str]) -> str:
    if not tools:
        template = template.replace(f"{TOOLS}\n", "").replace(f"\n{TOOLS}", "")
    return escape(question.text).join(part.replace(TOOLS, tools) for part in template.split(QUESTION))


def _own_messages(question: Question, tools: str, escape: Callable[[str], str]) -> list[Message]:
    """Return the messages of a record, with a description of the tools at the end of the system message."""
    if not question.messages:
        raise DataError(
            f"question {question.id!r} ({question.text[:80]!r}): task.prompt=messages needs a chat in its record, and "
            "there is none"
        )
    messages = [_escaped(message, escape) for message in question.messages]
    if tools and messages[0].get("role") == "system":
        messages[0] = messages[0] | {"content": f"{content_of(messages[0])}\n{tools}"}
    elif tools:
        messages.insert(0, {"role": "system", "content": tools})
    return messages


def _escaped(message: Message, escape: Callable[[str], str]) -> Message:
    content = message.get("content")
    if isinstance(content, list):
        return message | {"content": [{"type": "text", "text": escape(content_of(message))}]}
    return message | {"content": escape(content_of(message))}
