"""Chat templates that do with a system message, and with the beginning of a reply, what they like."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from atpo_fast.common.errors import InputError
from atpo_fast.data.chat_templates import ChatTemplateError, render, reply_opening, template_shows_tools
from atpo_fast.data.prompts import PROMPTS, Prompt
from atpo_fast.data.questions import Message, Question
from atpo_fast.data.tokenizers import train_bpe

QUESTION = Question(id="q", text="Where is it?", answers=("here",))
SYSTEM: Message = {"role": "system", "content": "Be good."}
USER: Message = {"role": "user", "content": "Where is it?"}

REPLY = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{% endfor %}" + REPLY
FOLDS = (  # as Mistral and Gemma 3: into the next user message, and lost where there is none
    "<s>{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<|{{ m['role'] }}|>{{ (first if loop.first else '') + m['content'] }}{% endfor %}" + REPLY
)
REFUSES = (  # as Gemma 2
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
)
WANTS_A_USER = (  # as Qwen3.5
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ raise_exception('No user query found in messages.') }}{% endif %}" + PLAIN
)
DROPS = PLAIN.replace("<|{{", "{% if m['role'] == 'user' %}<|{{").replace("{% endfor %}", "{% endif %}{% endfor %}")
STUMBLES = "{{ messages[1]['content'] }}"  # an undefined message: an error of jinja2 of another kind
LOSES = "<s>" + REPLY


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    made = train_bpe(["Be good. Where is it?"], 300)
    made.chat_template, made.name_or_path = template, "models/small"
    return made


@pytest.mark.parametrize("template", [FOLDS, REFUSES, WANTS_A_USER, DROPS])
def test_a_lone_system_message_becomes_a_user_message(template: str) -> None:
    """Fails if the prompt is lost (`<s>` alone) or refused with a traceback, as of Mistral, Gemma and Qwen3.5."""
    start = "<s>" if template == FOLDS else ""
    assert render([SYSTEM], tokenizer(template)) == f"{start}<|user|>Be good.<|assistant|>"
    (published,) = PROMPTS["published"].fill(QUESTION)
    assert "\nuser\nWhere is it?<|assistant|>" in render([published], tokenizer(template))


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (PLAIN, "<|system|>Be good.<|user|>Where is it?<|assistant|>"),
        (FOLDS, "<s><|user|>Be good.\n\nWhere is it?<|assistant|>"),
        (REFUSES, "<|user|>Be good.\n\nWhere is it?<|assistant|>"),
        (WANTS_A_USER, "<|system|>Be good.<|user|>Where is it?<|assistant|>"),
        (DROPS, "<|user|>Be good.\n\nWhere is it?<|assistant|>"),
        (None, "Be good.\nWhere is it?\n"),
    ],
)
def test_a_system_message_beside_a_user_message_is_never_lost(template: str | None, written: str) -> None:
    """Fails if instructions are dropped without a word, or a template that takes them as they are is not left to it."""
    assert render([SYSTEM, USER], tokenizer(template)) == written


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (LOSES, r"leaves out the text that ends in 'Where is it\?'"),
        (STUMBLES, r"refuses it \(UndefinedError: "),
        ("{{ messages | nonsense }}", r"refuses it \(TemplateAssertionError: No filter named 'nonsense'"),
    ],
)
def test_a_template_without_the_question_is_named(template: str, what: str) -> None:
    """Fails if every prompt is the same, or the error does not say whose template it is and how it begins."""
    with pytest.raises(ChatTemplateError, match=rf"the chat template of 'models/small' \(it begins .*{what}") as caught:
        render([USER], tokenizer(template))
    assert isinstance(caught.value, InputError) and "task.prompt" in str(caught.value)
    with pytest.raises(ChatTemplateError, match="in the place of the system message it leaves out"):
        render([SYSTEM], tokenizer(LOSES))


@pytest.mark.parametrize(
    ("reply", "opening"),
    [
        ("<|assistant|>\n<think>\n", "<think>\n"),
        ("<|assistant|>\n<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),  # Qwen3 that is not to think
        ("<|assistant|>\n", ""),
    ],
)
def test_what_the_template_writes_of_the_reply(reply: str, opening: str) -> None:
    """Fails if tags of the instructions are taken for the reply's, or those of the reply are overlooked."""
    made = tokenizer(PLAIN.replace("<|assistant|>", reply))
    for messages in (PROMPTS["published"].fill(QUESTION), [SYSTEM, USER]):
        assert reply_opening(render(messages, made), messages, made) == opening


def test_the_opening_without_a_chat_template() -> None:
    """Fails if a prompt of the user's own that ends in a tag does not count as its beginning."""
    bare = tokenizer(None)
    for user, opening in (("{question}\n<think>", "<think>\n"), ("Use <think> </think>. {question}", "")):
        messages = Prompt(user=user).fill(QUESTION)
        assert reply_opening(render(messages, bare), messages, bare) == opening


def test_tools_in_the_layout_that_the_template_takes() -> None:
    """Fails if tools count as shown by a layout in which the prompt is not written."""
    schemas = [{"type": "function", "function": {"name": "convert"}}]
    shows = "{% if tools %}{{ tools | tojson }}{% endif %}"
    assert template_shows_tools(tokenizer(shows + FOLDS), schemas)
    assert not template_shows_tools(tokenizer(shows + LOSES), schemas)
