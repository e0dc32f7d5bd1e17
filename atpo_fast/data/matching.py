"""Compare an answer with the accepted ones: exact match and F1 after normalisation.

`published` is the normalisation of the AT2PO code, which is SQuAD's: lower case, no ASCII punctuation, no articles. It
takes an answer in the wrong Unicode form for a wrong one. `unicode` first brings both sides into one form: TeX
commands around text go (`\\text{Oslo}`), accents are composed, full-width characters become plain ones, dashes, minus
signs and curly quotes become those of ASCII, and characters without a shape (soft hyphens, zero-width spaces) go.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from atpo_fast.common.choices import Normalisation

_YES_NO = ("yes", "no", "noanswer")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_TEX_COMMAND = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|normal|up)?|math(?:rm|bf|it|sf|tt)|mbox|hbox|operatorname)(?=\s?\{)"
)
_LONGEST_RUN, _JOINER = 30, "\u034f"
_TEX_SPACE = re.compile(r"\\[ ,;:!]|~")
_DASHES = "‐‑‒–—―−﹘﹣－"
_SINGLE_QUOTES, _DOUBLE_QUOTES = "‘’‚‛′`´ʼ", "“”„‟″«»"
_ASCII = str.maketrans(
    dict.fromkeys(_DASHES, "-") | dict.fromkeys(_SINGLE_QUOTES, "'") | dict.fromkeys(_DOUBLE_QUOTES, '"')
)


def normalise_answer(text: str, normalise: Normalisation = "published") -> str:
    """Return text in lower case, without ASCII punctuation and the words a, an, the, and with single spaces.

    With `unicode`, what is only written in another way becomes the same (see the module docstring).
    """
    if normalise == "unicode":
        text = _one_form(text)
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str], normalise: Normalisation = "published") -> float:
    """Return 1 when the prediction equals one of the answers after normalisation, else 0."""
    predicted = normalise_answer(prediction, normalise)
    return float(any(normalise_answer(answer, normalise) == predicted for answer in answers))


def f1_score(prediction: str, answers: Sequence[str], normalise: Normalisation = "published") -> float:
    """Return the best F1 of shared words over the answers; yes, no and noanswer match only themselves."""
    predicted = normalise_answer(prediction, normalise)
    return max((_f1(predicted, normalise_answer(answer, normalise)) for answer in answers), default=0.0)


def _one_form(text: str) -> str:
    """Return text in one Unicode form, without TeX commands around text."""
    text = _TEX_SPACE.sub(" ", _TEX_COMMAND.sub("", text)).translate(_ASCII)  # ´ is a quote before it is an accent
    if text.isascii():  # in one form already
        return text
    text = unicodedata.normalize("NFKC", _with_short_runs(text)).translate(_ASCII)
    shapeless = [ord(c) for c in set(text) if unicodedata.category(c) == "Cf" or c == _JOINER]
    return text.translate(dict.fromkeys(shapeless))


def _with_short_runs(text: str) -> str:
    """Return text with a joiner after every 30 combining marks in a row (Unicode's stream-safe format).

    Python sorts such a run in quadratic time.
    """
    if len(text) <= _LONGEST_RUN or not any(map(unicodedata.combining, set(text))):
        return text
    parts, run = [], 0
    for character in text:
        run = run + 1 if unicodedata.combining(character) else 0
        if run > _LONGEST_RUN:
            parts.append(_JOINER)
            run = 1
        parts.append(character)
    return "".join(parts)


def _f1(predicted: str, answer: str) -> float:
    if predicted != answer and (predicted in _YES_NO or answer in _YES_NO):
        return 0.0
    got, wanted = predicted.split(), answer.split()
    shared = sum((Counter(got) & Counter(wanted)).values())
    return 2 * shared / (len(got) + len(wanted)) if shared else 0.0
