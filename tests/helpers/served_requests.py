"""The vocabulary of the models that tests serve over HTTP, with prompts and requests in it."""

from __future__ import annotations

from typing import Any

from atpo_fast.engines.base import PathNode, Request, SamplingParams
from atpo_fast.world.tokenizer import split_words, word_level_tokenizer

SMALL = word_level_tokenizer(split_words(" one two three?\n:Page Tool"))  # 10 tags among 20 tokens: calls happen often
PROMPTS = [
    SMALL.encode(text, add_special_tokens=False) for text in (" one two?\n", "Page?", "Tool three one?", ": two\n")
]


def request(number: int = 0, tree: str = "t", tokens: int = 5, **sampling: Any) -> Request:
    """The request for turn `number` + 1 of a tree, below its root, with `sampling` beside `tokens`."""
    prompt = PROMPTS[0]
    return Request(
        prompt_ids=prompt,
        sampling=SamplingParams(**{"max_new_tokens": tokens} | sampling),
        seed=number,
        path=(PathNode(key=(tree, 0), end=len(prompt)),),
        turn_key=(tree, number + 1),
    )
