"""Words of scripts that are written without spaces between them.

A run of such characters becomes its pairs of neighbours: 富士山は gives 富士, 士山, 山は. A query's pairs are then
among those of each passage that contains it, whatever stands around it there.
"""

from __future__ import annotations

import re
from itertools import pairwise

_RANGES = (
    (0x0E01, 0x0E3A),  # Thai, its digits and signs left out
    (0x0E40, 0x0E4E),
    (0x0E81, 0x0ECE),  # Lao
    (0x1000, 0x103F),  # Myanmar
    (0x1050, 0x108F),
    (0x1100, 0x11FF),  # Hangul letters
    (0x1780, 0x17D3),  # Khmer
    (0x3005, 0x3007),  # Chinese and Japanese: iteration marks, zero
    (0x3041, 0x309F),  # Hiragana
    (0x30A1, 0x30FA),  # Katakana
    (0x30FC, 0x30FF),
    (0x3105, 0x312F),  # Bopomofo
    (0x3131, 0x318E),  # Hangul letters
    (0x31A0, 0x31BF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Chinese characters
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),  # Hangul syllables
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),  # Katakana of half width
    (0x20000, 0x323AF),
)
_RUN = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _RANGES) + "]+")


def by_script(text: str, *, singles: bool = False) -> str:
    """Return a text whose runs of unspaced scripts are words with spaces between them; any other text as it is.

    A word stands for two neighbours, or for a character alone: where the run has only one, and with `singles` for
    each. It consists of the numbers of its characters, because some of them (Thai vowels) are no letters to Python.
    """
    if text.isascii():
        return text

    def words(match: re.Match[str]) -> str:
        run = match[0]
        pairs = [_word(first + second) for first, second in pairwise(run)]
        return f" {' '.join([*pairs, *map(_word, run)] if singles or not pairs else pairs)} "

    return _RUN.sub(words, text)


def _word(characters: str) -> str:
    return "_".join(f"u{ord(character):x}" for character in characters)
