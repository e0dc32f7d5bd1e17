"""From a question to the token ids of its prompt.

`published` says, in our own words, what the system message of the AT2PO data says, in the same order, and keeps its
layout: one system message that ends in a newline, the word "user", a newline and the question. One difference is
deliberate: the published text was written in a non-raw string, so its models were shown a backspace character followed
by "oxed{...}" where a backslash was meant, while the reward asks for a real `\\boxed{`. Here it is a real backslash.

`short` is the bare question and a newline, for small models trained from scratch.

Tools beyond the published ones are described in both (`ToolDescriptions`): through the chat template where it shows
tools, else in words; `published` describes them after the system prompt, `short` before the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jinja2

from atpo_fast.data.questions import Question

if TYPE_CHECKING:  # takes seconds to import, which the tools need not wait for
    from transformers import PreTrainedTokenizerBase

PromptKind = Literal["published", "short"]

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


def prompt_text(question: Question, kind: PromptKind, tools: ToolDescriptions = NO_TOOLS) -> str:
    """Return the prompt as one text; for `published`, the content of its single system message."""
    if kind == "short":
        return f"{tools.text}\n{question.text}\n" if tools.text else f"{question.text}\n"
    described = f"\n{tools.text}" if tools.text else ""
    return f"{SYSTEM_PROMPT}{described}\nuser\n{question.text}"


def encode_prompt(
    question: Question,
    tokenizer: PreTrainedTokenizerBase,
    kind: PromptKind,
    max_tokens: int,
    tools: ToolDescriptions = NO_TOOLS,
) -> list[int]:
    """Return the token ids of a question's prompt; `published` goes through the tokenizer's chat template, if any.

    Raises:
        ValueError: the prompt has more than `max_tokens` tokens, or characters the tokenizer does not know.
    """
    text = prompt_text(question, kind, tools)
    if kind == "published":
        text = _render(text, tokenizer, tools.schemas)
    ids = tokenizer.encode(text, add_special_tokens=False)
    where = f"question {question.id!r} ({question.text[:80]!r})"
    if len(ids) > max_tokens:
        raise ValueError(f"{where}: its prompt has {len(ids)} tokens, data.max_prompt_tokens={max_tokens} allows fewer")
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        raise ValueError(
            f"{where}: the tokenizer does not know all words of its {kind} prompt; the embedded world needs "
            "data.prompt=short"
        )
    return ids


def template_shows_tools(tokenizer: PreTrainedTokenizerBase, schemas: Sequence[dict[str, Any]]) -> bool:
    """Return whether the chat template writes these tools into a prompt: it is rendered with them and without.

    Some templates have no place for tools, some show them only beside a user message, and some refuse a conversation
    of one system message with tools; all of these count as not showing them.
    """
    if not tokenizer.chat_template:
        return False
    without = _render("", tokenizer, ())
    try:
        shown = _render("", tokenizer, schemas)
    except (jinja2.TemplateError, TypeError):
        return False
    names = [str(schema["function"]["name"]) for schema in schemas]
    return all(shown.count(name) > without.count(name) for name in names)


def _render(content: str, tokenizer: PreTrainedTokenizerBase, schemas: Sequence[dict[str, Any]]) -> str:
    """Return the system message as the model reads it, up to where its answer begins."""
    if not tokenizer.chat_template:
        return f"{content}\n"
    messages = [{"role": "system", "content": content}]
    shown = tokenizer.apply_chat_template(
        messages, tools=list(schemas) or None, tokenize=False, add_generation_prompt=True
    )
    return str(shown)
