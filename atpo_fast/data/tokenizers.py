"""Tokenizers: loaded from a model folder, or trained on the texts at hand for models trained from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TAGS = tuple(f"<{slash}{name}>" for name in ("think", "search", "python", "result", "answer") for slash in ("", "/"))

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens on `texts`.

    Any text round-trips. Each tag (`<think>` … `</answer>`) is one ordinary token, which decoding never skips;
    `<|endoftext|>` pads and `<|im_end|>` ends.

    Raises:
        ValueError: `vocab_size` leaves no room beside the 256 bytes and the added tokens.
    """
    specials = ["<|endoftext|>", "<|im_end|>"]
    learned = vocab_size - len(TAGS)
    if learned < 256 + len(specials):
        raise ValueError(
            f"model.vocab_size={vocab_size} is too small: bytes, special tokens and tags already take "
            f"{256 + len(specials) + len(TAGS)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=learned, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=specials[1], pad_token=specials[0], clean_up_tokenization_spaces=False
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder; a missing pad token becomes the end-of-sequence token.

    Raises:
        FileNotFoundError: the folder or a tokenizer in it does not exist.
        ValueError: the tokenizer cannot be read, or has no end-of-sequence token.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"model.path={str(path)!r} is not a folder")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"model.path={str(path)!r} holds no tokenizer (none of {', '.join(_TOKENIZER_FILES)}): "
            "save one there with tokenizer.save_pretrained(folder)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"model.path={str(path)!r}: its tokenizer cannot be read: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.path={str(path)!r}: its tokenizer has no end-of-sequence token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
