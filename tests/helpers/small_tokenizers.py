"""Small tokenizers of several kinds, and where a stop string ends in their tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "a <search> what is é? </search> and <answer> naïve 東京 </answer> \n",
    "the </sea of </search></answer> tags",
] * 5


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("</ärgernis>", special=True)])  # not byte-encoded in the vocabulary
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def metaspace() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=130, special_tokens=["<eos>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def word_level() -> PreTrainedTokenizerFast:
    words = ["<eos>", "</search>", "e1", "the", "</sea", "rch>", "?"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def normalising(normalizer: normalizers.Normalizer) -> PreTrainedTokenizerFast:
    """Byte-level, behind a normaliser that is applied to most of its added tokens as well."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizer
    tokens = ["<tool_call>", "[TOOL_CALLS]", "</think>", "  ", "covid"]
    tokenizer.add_tokens([AddedToken(token, normalized=token != "</think>", special=False) for token in tokens])
    return tokenizer


def first_stop(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], stops: Sequence[str]) -> tuple[int, str] | None:
    """Index of the token that completes a stop string, by decoding every prefix."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        found = [(text.find(stop) + len(stop.encode()), stop) for stop in stops if stop in text]
        if found:
            return count - 1, min(found)[1]
    return None


def numbered(count: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `count` words: an end of sequence, a stop string and w0, w1, ..."""
    words = ["<eos>", "</search>", *(f"w{i}" for i in range(count - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
