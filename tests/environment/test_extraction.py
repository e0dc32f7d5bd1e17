"""How answers are read and compared: each way, each Unicode form, and all in time linear in the text."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atpo_fast.data.matching import exact_match, f1_score, normalise_answer
from atpo_fast.environment.extraction import (
    EXTRACTIONS,
    after_hashes,
    answer_in_tags,
    extract_answer,
    extraction_by,
    format_ok,
    last_line,
    turn_format_ok,
)
from atpo_fast.environment.tags import format_result, parse_call


@pytest.mark.parametrize(
    ("read", "text", "answer"),
    [
        (answer_in_tags, "<answer> a </answer> <answer> b </answer>", "b"),
        (answer_in_tags, "<answer> a </answer> <answer> b", "a"),  # the last one that is closed
        (answer_in_tags, "<answer> a <answer> b </answer>", "a <answer> b"),
        (answer_in_tags, "</answer> a <answer>", None),
        (answer_in_tags, "<answer></answer>", ""),
        (last_line, "I think.\n 42 \n\n", "42"),
        (last_line, "42", "42"),
        (last_line, " \n ", None),
        (last_line, f"<search> x </search>{format_result('')}", None),  # what a tool has answered is no answer
        (last_line, f"<search> x </search>{format_result('')}\n7", "7"),
        (after_hashes, "3*14=42\n#### 42\n", "42"),
        (after_hashes, "#### 1\n#### 2 apples\nDone.", "2 apples"),
        (after_hashes, "####", None),
        (after_hashes, "42", None),
    ],
)
def test_answers_of_each_kind(read: object, text: str, answer: str | None) -> None:
    """Fails if another part of the text is taken for the answer."""
    assert callable(read) and read(text) == answer


@pytest.mark.parametrize(
    ("kind", "text", "well_formed"),
    [
        ("boxed", "<think> a </think> <answer> x </answer>", False),
        ("tag", "<think> a </think> <answer> x </answer>", True),
        ("tag", "<answer> x </answer>", False),  # no thought
        ("tag", "<think> a </think> <search> b <answer> x </answer>", False),
        ("hashes", "#### 42", True),
        ("hashes", "42", False),
        ("hashes", "<search> x </search> #### 42", False),  # a call without its result
        ("last_line", "42", True),
    ],
)
def test_the_format_that_goes_with_each_kind(kind: str, text: str, well_formed: bool) -> None:
    """Fails if a task without boxes is asked for boxes, or one without an answer is well-formed."""
    extraction = EXTRACTIONS[kind]  # type: ignore[index]
    assert extraction.well_formed(text, extraction.read(text)) == well_formed


@pytest.mark.parametrize("kind", EXTRACTIONS)
def test_what_is_written_is_read(kind: str) -> None:
    """Fails if demonstrations write an answer that the task does not read."""
    extraction = EXTRACTIONS[kind]  # type: ignore[index]
    assert extraction.write is not None
    assert extraction.read(f"<think> a </think> {extraction.write('{x} of y')}") == "{x} of y"
    assert extraction_by(str).write is None


# ---- linear time (R16)


LONG, SECONDS = 200_000, 5  # of CPU time: a linear reader takes 0.3 at most, a quadratic one 15 to hours
REPEATED = [
    "\\boxed{",
    "\\boxed{}",
    "{",
    "}",
    "\\boxed{{",
    "<answer>",
    "</answer>",
    "<think>",
    "</think><think>",
    "<search>",
    "<search></search>",
    "<search></search><result>",
    "<result></result><python>",
    "####",
    "#### \n",
    "\n",
    " ",
    "\\text{",
    "a ",
    "\u0301\u0323",  # combining marks, which normalisation sorts
]


@pytest.mark.parametrize("piece", REPEATED)
@pytest.mark.parametrize("frame", ["{}", "<answer>{}</answer>", "<think></think><answer>{}"])
def test_no_reader_of_model_text_is_quadratic(piece: str, frame: str) -> None:
    """Fails (perhaps by never ending) if a reader goes back over what it has read for every piece of a repetitive text.

    `test_linear_time.py` finds quadratic ones that are faster.
    """
    text = frame.replace("{}", piece * (LONG // len(piece)))
    before = time.thread_time()
    for extraction in EXTRACTIONS.values():
        extraction.well_formed(text, extraction.read(text))
    format_ok(text)
    turn_format_ok(text, called=True)
    parse_call(text, ["search", "python", "calc"])
    for normalise in ("published", "unicode"):
        f1_score(text, ["a b"], normalise)  # type: ignore[arg-type]
    assert time.thread_time() - before < SECONDS


def by_hand(span: str) -> str | None:
    """The published search for the last balanced box, which starts again at every box."""
    start = max(span.rfind("\\boxed{"), span.rfind("\\fbox{"))
    while start >= 0:
        depth = 0
        for position in range(span.index("{", start), len(span)):
            depth += {"{": 1, "}": -1}.get(span[position], 0)
            if depth == 0:
                return span[span.index("{", start) + 1 : position].strip()
        start = max(span.rfind("\\boxed{", 0, start), span.rfind("\\fbox{", 0, start))
    return None


@given(st.lists(st.sampled_from(["\\boxed{", "\\fbox{", "\\boxed", "{", "}", "a", "\\"]), max_size=14).map("".join))
def test_the_box_is_the_published_one(span: str) -> None:
    """Fails if reading in one pass finds another box than starting again at each of them."""
    assert extract_answer(f"<answer>{span}</answer>") == by_hand(span)


# ---- Unicode (R13)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("Oslo", "\\text{Oslo}"),
        ("New York", "\\textbf{New\\ York}"),
        ("New York", "\\mathrm{New~York}"),
        ("1914-1918", "1914–1918"),
        ("1914-1918", "1914—1918"),
        ("-5", "−5"),
        ("O'Hara", "O’Hara"),
        ('"Heroes"', "“Heroes”"),
        ("Zoë", unicodedata.normalize("NFD", "Zoë")),
        ("Pokémon", "Pok\u0065\u0301mon"),
        ("12 km", "１２\u00a0ｋｍ"),
        ("cooperate", "co\u00adoperate"),
        ("e\u200bnd", "end"),
    ],
)
def test_what_is_only_written_otherwise(gold: str, answer: str) -> None:
    """Fails if `unicode` takes another form of the same answer for a wrong one, or `published` does not."""
    for pair in ((gold, answer), (answer, gold)):
        assert exact_match(pair[0], [pair[1]], "unicode") == f1_score(pair[0], [pair[1]], "unicode") == 1.0
        assert exact_match(pair[0], [pair[1]]) == 0.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Zoë", "Zoe"),
        ("5", "-6"),
        ("textile", "ile"),
        ("東京", "大阪"),
        ("\\frac{1}{2}", "12 frac"),
        ("naïve", "naive"),
    ],
)
def test_what_differs_stays_different(one: str, other: str) -> None:
    """Fails if the normalisation throws away more than a form: accents, letters, words that begin as a command does."""
    assert exact_match(one, [other], "unicode") == exact_match(one, [other]) == 0.0


@given(st.text(alphabet=st.characters(max_codepoint=126), max_size=30).filter(lambda t: "\\" not in t and "~" not in t))
def test_plain_text_is_normalised_alike(text: str) -> None:
    """Fails if `unicode` changes ASCII text without TeX commands, for which both are the published rule."""
    kept = "".join(c for c in text if c.isprintable())
    assert normalise_answer(kept, "unicode") == normalise_answer(kept, "published")
