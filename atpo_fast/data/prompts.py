"""From a question to the token ids of its prompt.

`published` says, in our own words, what the system message of the AT2PO data says, in the same order, and keeps its
layout: one system message that ends in a newline, the word "user", a newline and the question. One difference is
deliberate: the published text was written in a non-raw string, so its models were shown a backspace character followed
by "oxed{...}" where a backslash was meant, while the reward asks for a real `\\boxed{`. Here it is a real backslash.

`short` is the bare question and a newline, for small models trained from scratch.
"""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedTokenizerBase

from atpo_fast.data.questions import Question

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


def prompt_text(question: Question, kind: Literal["published", "short"]) -> str:
    """The prompt as one text; for `published`, the content of its single system message."""
    if kind == "short":
        return f"{question.text}\n"
    return f"{SYSTEM_PROMPT}\nuser\n{question.text}"


def encode_prompt(
    question: Question, tokenizer: PreTrainedTokenizerBase, kind: Literal["published", "short"], max_tokens: int
) -> list[int]:
    """Token ids of a question's prompt; `published` goes through the tokenizer's chat template where it has one.

    Raises:
        ValueError: the prompt has more than `max_tokens` tokens, or characters the tokenizer does not know.
    """
    text = prompt_text(question, kind)
    if kind == "published":
        text = _render(text, tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) > max_tokens:
        raise ValueError(
            f"question {question.id!r} ({question.text[:80]!r}): its prompt has {len(ids)} tokens, "
            f"data.max_prompt_tokens={max_tokens} allows fewer"
        )
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        raise ValueError(
            f"question {question.id!r} ({question.text[:80]!r}): the tokenizer does not know all words of its {kind} "
            "prompt; the embedded world needs data.prompt=short"
        )
    return ids


def _render(content: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The system message as the model reads it, up to where its answer begins."""
    if not tokenizer.chat_template:
        return f"{content}\n"
    messages = [{"role": "system", "content": content}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
