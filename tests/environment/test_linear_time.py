"""Every function that reads text from outside takes time linear in it, whatever is repeated in the text.

Time is CPU time of this thread for a text and for one that is eight times as long. Where the ratio is beyond 24, time
grows with the square of the length (ratio 64), and not with the length (ratio 8): a difference that no other load on
the machine makes up. Times too short to matter are not compared.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from tokenizers import normalizers

from atpo_fast.common.secrets import redacted, shown
from atpo_fast.config import ColumnsConfig
from atpo_fast.data.fields import answers_of, question_of
from atpo_fast.data.matching import exact_match, f1_score
from atpo_fast.data.records import Record, parse_line
from atpo_fast.data.tables import csv_rows
from atpo_fast.environment import Escaper, escape_tags, parse_call, unescape_tags
from atpo_fast.environment.answers import answer_text
from atpo_fast.environment.arguments import SchemaArguments
from atpo_fast.environment.extraction import EXTRACTIONS, format_ok, turn_format_ok
from atpo_fast.environment.python_tool import bare_code
from atpo_fast.environment.search import clean_query, format_hits
from atpo_fast.retrieval.bm25 import split_words
from atpo_fast.retrieval.contents import document_contents
from atpo_fast.retrieval.scripts import by_script
from tests.helpers.small_tokenizers import byte_level, normalising

SHORT, TIMES = 2_000, 8
SECONDS = 0.0025  # of the longer text, below which nothing is compared; by the square, 0.01 of one twice as long
TOOLS = ("search", "python", "calc")
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
ANY = ColumnsConfig()


def read_answers(text: str) -> None:
    for extraction in EXTRACTIONS.values():
        extraction.well_formed(text, extraction.read(text))
    format_ok(text)
    turn_format_ok(text, called=True)


def scored(text: str) -> None:
    for normalise in ("published", "unicode"):
        f1_score(text, ["a b"], normalise)  # type: ignore[arg-type]
        exact_match("a b", [text], normalise)  # type: ignore[arg-type]


def read_record(text: str) -> None:
    record = Record("line 1", 1, {"question": text, "answer": text})
    question_of(record, ANY)
    answers_of(record, ANY)


FUNCTIONS: Mapping[str, Callable[[str], Any]] = {
    "answers": read_answers,
    "calls": partial(parse_call, tools=TOOLS),
    "scores": scored,
    "escaping": lambda text: unescape_tags(escape_tags(text, TOOLS), TOOLS),
    "escaping for a tokenizer": Escaper(byte_level(), TOOLS),
    "escaping for one that normalises": Escaper(normalising(normalizers.NFKC()), TOOLS),
    "code": bare_code,
    "answers of tools": lambda text: answer_text(text, 10**9),
    "arguments": SchemaArguments(SCHEMA).parse,
    "queries": lambda text: (clean_query(text), by_script(text), by_script(text, singles=True)),
    "words": lambda text: split_words([text]),
    "hits": lambda text: format_hits([text], 10**9),
    "documents": lambda text: document_contents({"contents": text}),
    "records": read_record,
    "lines": lambda text: parse_line("line 1", 1, text.encode()),
    "cells": lambda text: list(csv_rows("f", f"question\n{text}\n".encode())),  # type: ignore[arg-type]
    "secrets": lambda text: (redacted(text), shown({"key": text})),
}
PIECES = [
    *("\\boxed{", "\\boxed{}", "{", "}", "\\boxed{{", "\\text{", "<answer>", "</answer>", "<think>", "</think><think>"),
    *(
        "<search>",
        "<search></search>",
        "<search></search><result>",
        "<result></result><python>",
        "####",
        "#### \n",
        "#",
    ),
    *("\n", " ", "\t", "\n ", "a ", "a\n", "\u0301\u0323", "＜", "&lt;", "&", "amp;", "```\n", "~~~ ", "`", "東", "é"),
    *('"', "'", "' '", '" "', "['", "[", "[]", '{"a":', ",", ":", "://a@", "Bearer a", "${", "1", "1,", "-", "$", "%"),
]
FRAMES = ["{}", "<answer>{}</answer>", "#### a{}b", "['a{}b']", '{"a": "{}"}', "```\n{}x"]


def seconds(function: Callable[[str], Any], text: str) -> float:
    """CPU time of a call, errors included, without the collector of garbage, which looks at all that tests hold."""
    gc.collect(0)
    gc.disable()
    before = time.thread_time()
    try:
        with suppress(ValueError, RecursionError):
            function(text)
        return time.thread_time() - before
    finally:
        gc.enable()


def is_quadratic(function: Callable[[str], Any], frame: str, piece: str) -> bool:
    """Whether the longer text takes more than three times what its length explains, also at two more looks."""
    short, long = (frame.replace("{}", piece * (n * SHORT // len(piece))) for n in (1, TIMES))
    if (first := seconds(function, long)) < SECONDS:
        return False
    most = 3 * TIMES * min(seconds(function, short) for _ in range(2))
    return first > most and all(seconds(function, long) > most for _ in range(2))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_time_grows_with_the_length(name: str) -> None:
    """Fails if a function goes back over what it has read for every piece of a repetitive text."""
    function = FUNCTIONS[name]
    assert not [(frame, piece) for frame in FRAMES for piece in PIECES if is_quadratic(function, frame, piece)]


def test_a_quadratic_function_is_found() -> None:
    """Fails if the measurement above would pass a function that is not linear."""
    assert is_quadratic(lambda text: [text[:place].upper() for place in range(0, len(text), 8)][:0], "{}", "a")
    assert not is_quadratic(lambda text: [character.upper() for character in text * 10], "{}", "a")
