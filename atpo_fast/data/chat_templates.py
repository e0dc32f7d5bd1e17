"""Render messages through a tokenizer's chat template, whatever it does with a system message.

Some templates fold a system message into the user message behind it, and drop one that stands alone; some refuse it;
some demand a user message. What such a template drops or refuses is given to it as a user message instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from atpo_fast.common.errors import InputError
from atpo_fast.data.questions import Message, content_of

if TYPE_CHECKING:  # takes seconds to import, which the tools need not wait for
    from transformers import PreTrainedTokenizerBase

_OPENING_TAGS = ("<think>", "<answer>")  # tags with which a reply may begin


class ChatTemplateError(InputError):
    """A chat template that cannot write a prompt; the message names it, and says what it did."""


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    schemas: Sequence[dict[str, Any]] = (),
) -> str:
    """Return messages as the model reads them, up to where its reply begins.

    Without a chat template that is their texts, each with a newline behind it.

    Args:
        messages: messages of the prompt.
        tokenizer: its chat template writes them.
        schemas: tools for the template, in OpenAI's form.

    Raises:
        ChatTemplateError: the template refuses the messages or leaves text of them out, also without a system message.
    """
    if not tokenizer.chat_template:
        return "".join(f"{content_of(message)}\n" for message in messages)
    faults = []
    for layout in _layouts(messages):
        text, fault = _try(layout, tokenizer, schemas)
        if text is not None:
            return text
        faults.append(fault)
    raise ChatTemplateError(
        f"the chat template of {tokenizer.name_or_path or 'the tokenizer'!r} (it begins "
        f"{' '.join(str(tokenizer.chat_template).split())[:80]!r}) cannot write the prompt: it "
        f"{', and with a user message in the place of the system message it '.join(faults)}; give the tokenizer "
        "another chat_template, or choose another task.prompt"
    )


def reply_opening(text: str, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what of the reply stands in a rendered prompt already, from its first tag on: `<think>\n`, or nothing.

    Args:
        text: prompt as `render` has returned it.
        messages: its messages; without a chat template, the last of them may end in a tag that begins the reply.
        tokenizer: its chat template has written the prompt.
    """
    last = content_of(messages[-1]).strip()
    behind = text[text.rindex(last) + len(last) :]
    if not tokenizer.chat_template:
        return next((f"{tag}{behind}" for tag in _OPENING_TAGS if last.endswith(tag)), "")
    starts = [behind.index(tag) for tag in _OPENING_TAGS if tag in behind]
    return behind[min(starts) :] if starts else ""


def template_shows_tools(
    tokenizer: PreTrainedTokenizerBase, schemas: Sequence[dict[str, Any]], roles: Sequence[str] = ("system",)
) -> bool:
    """Return whether the chat template writes these tools into a prompt: it is rendered with them and without.

    Some templates have no place for tools, some show them only beside a user message, and some refuse a conversation
    of one system message with tools; all of these count as not showing them.
    """
    if not tokenizer.chat_template:
        return False
    for layout in _layouts([{"role": role, "content": "What is asked?"} for role in roles]):
        without, _ = _try(layout, tokenizer, ())
        if without is not None:
            shown, _ = _try(layout, tokenizer, schemas)
            names = [str(schema["function"]["name"]) for schema in schemas]
            return shown is not None and all(shown.count(name) > without.count(name) for name in names)
    return False


def _layouts(messages: Sequence[Message]) -> list[list[Message]]:
    """Return the messages as they are, and with what a system message says put into the next user message."""
    folded: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message.get("role") == "system":
            waiting.append(content_of(message))
        elif message.get("role") == "user" and waiting:
            folded.append(message | {"content": "\n\n".join([*waiting, content_of(message)])})
            waiting = []
        else:
            folded.append(message)
    if waiting:
        folded.append({"role": "user", "content": "\n\n".join(waiting)})
    return [list(messages)] if folded == list(messages) else [list(messages), folded]


def _try(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, schemas: Sequence[dict[str, Any]]
) -> tuple[str | None, str]:
    """Return the rendered messages, or None and what is wrong with them."""
    try:
        text = str(
            tokenizer.apply_chat_template(
                list(messages), tools=list(schemas) or None, tokenize=False, add_generation_prompt=True
            )
        )
    except Exception as error:  # a template may raise anything
        return None, f"refuses it ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    contents = [content_of(message).strip() for message in messages if message.get("role") != "assistant"]
    lost = [content for content in contents if content not in text]
    if lost:
        return None, f"leaves out the text that ends in {' '.join(lost[-1].split())[-80:]!r}"
    return text, ""
