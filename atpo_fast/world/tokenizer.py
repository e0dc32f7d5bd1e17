"""A word-level tokenizer for the embedded world.

A token is a word together with the space before it, so that any text of known words is restored exactly, and so
that a piece of text has the same tokens whatever stands before and after it. A word written with and without a space
before it is two tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from atpo_fast.data.tokenizers import TAGS
from atpo_fast.environment.search import NO_RESULTS
from atpo_fast.environment.tags import CALL_LIMIT_NOTICE, format_result
from atpo_fast.world.facts import World

_PIECE = r"Page \d+:| ?\\boxed\{| ?\w+| ?[^\w\s]|\s"
_FRAME = (  # every text of the world and of its environment, names left out
    "What is the of?\n",
    "<think> is then</think><search> of</search>",
    "The of is.",
    "Nobody ever met the of.",
    format_result("Page 1: The of is.\nPage 2: Nobody ever met the of."),
    "<answer> \\boxed{ }</answer>",
    "\\boxed{}",
    NO_RESULTS,
    CALL_LIMIT_NOTICE,
    "Tool(search) was not called: nothing is between <search> and </search>. has no before it.",
)


def make_tokenizer(world: World, texts: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Make the tokenizer of a world.

    It knows the names of the world, the words of its sentences and of further `texts`, the tags, `<eos>`, `<pad>` and
    `<unk>`.
    """
    names = [name for word in (*world.entities, *world.relations) for name in (f" {word}", word)]
    words = [piece for text in (*_FRAME, *texts) for piece in split_words(text)]
    return word_level_tokenizer([*(f"Page {i}:" for i in range(1, 11)), *words, *names])


def split_words(text: str, tags: Sequence[str] = TAGS) -> list[str]:
    """Return the words of a text without tags, each with the space before it."""
    for tag in tags:
        text = text.replace(tag, "\0")
    splitter = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    return [piece for part in text.split("\0") for piece, _ in splitter.pre_tokenize_str(part)]


def word_level_tokenizer(words: Iterable[str], tags: Sequence[str] = TAGS) -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows exactly `words` (as `split_words` cuts them), the tags and three specials."""
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(["<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
