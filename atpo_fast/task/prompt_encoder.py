"""From a question to the token ids of its prompt."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from atpo_fast.data.chat_templates import render, reply_opening
from atpo_fast.data.prompts import NO_TOOLS, Prompt, ToolDescriptions
from atpo_fast.data.questions import Message, Question
from atpo_fast.environment.escaping import Escaper
from atpo_fast.environment.tags import protocol_tags

_SAMPLE = Question(
    id="sample", text="What is asked?", answers=(), messages=({"role": "user", "content": "What is asked?"},)
)


class PromptEncoder:
    """A function from a question to the token ids of its prompt.

    A question is data: a tag or a token of the tokenizer in it is escaped as in the results of tools. The messages of a
    record may explain the tags, so there only the tokenizer's other tokens are.

    Attributes:
        opening: what the chat template writes of every reply, such as `<think>` and a newline; mostly nothing.

    Args:
        prompt: templates of the messages.
        tokenizer: encodes the prompt, through its chat template where the prompt asks for it.
        max_tokens: longest prompt.
        tools: descriptions of tools.
        tool_names: names of the tools, whose tags a question cannot hold.

    Raises:
        ChatTemplateError: the chat template cannot write the prompt.
    """

    def __init__(
        self,
        prompt: Prompt,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        tools: ToolDescriptions = NO_TOOLS,
        tool_names: Sequence[str] = (),
    ) -> None:
        self.prompt, self.tokenizer, self.max_tokens, self.tools = prompt, tokenizer, max_tokens, tools
        self._escape = Escaper(tokenizer, tool_names, protocol_tags(tool_names) if prompt.messages else ())
        messages = self.messages(_SAMPLE)
        self.opening = reply_opening(self._render(messages), messages, tokenizer) if prompt.chat else ""

    def __call__(self, question: Question) -> list[int]:
        """Return the token ids of a question's prompt.

        Raises:
            ValueError: the prompt has more than `max_tokens` tokens, or characters the tokenizer does not know.
            DataError: the record has no messages where they are the prompt.
            ChatTemplateError: the chat template cannot write it.
        """
        ids: list[int] = self.tokenizer.encode(self._render(self.messages(question)), add_special_tokens=False)
        where = f"question {question.id!r} ({question.text[:80]!r})"
        if len(ids) > self.max_tokens:
            raise ValueError(
                f"{where}: its prompt has {len(ids)} tokens, data.max_prompt_tokens={self.max_tokens} allows fewer"
            )
        if self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in ids:
            raise ValueError(
                f"{where}: the tokenizer does not know all words of its prompt; the embedded world needs "
                "task.prompt=short"
            )
        return ids

    def messages(self, question: Question) -> list[Message]:
        """Return the messages of a question's prompt."""
        return self.prompt.fill(question, self.tools.text, self._escape)

    def _render(self, messages: Sequence[Message]) -> str:
        if not self.prompt.chat:
            return "".join(str(message["content"]) for message in messages)
        return render(messages, self.tokenizer, self.tools.schemas)
