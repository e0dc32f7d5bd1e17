"""Stop strings on token ids: byte-level BPE, word-level and Metaspace tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from atpo_fast.engines.stops import StopMatcher, StopTable, vocabulary_bytes
from tests.helpers.small_tokenizers import byte_level, first_stop, metaspace, word_level


def walk(table: StopTable, ids: Sequence[int]) -> tuple[int, str] | None:
    matcher = StopMatcher([table])
    state = matcher.start[0]
    for index, token in enumerate(ids):
        state = matcher.next_state[state, token]
        if matcher.found[state] >= 0:
            return index, matcher.name(int(state)) or ""
    return None


# A stop spread over tokens, inside one token, after a false start, or next to multi-byte text that is missed or
# reported at another token fails here. The tokenizer kinds differ in where a token's spaces come from.
@pytest.mark.parametrize("make", [byte_level, metaspace, word_level])
def test_stops_equal_decoding_every_prefix(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    stops = ("</search>", "</answer>", "?")
    table = StopTable(vocabulary_bytes(tokenizer, len(tokenizer)), stops)
    texts = [
        "the </search> e1",
        "the </sea</search>",
        "<<</search>",
        "naïve é東京 </answer> </search>",
        "e1 the",
        "</sea rch> ?",
    ]
    encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    hits = 0
    for ids in encoded:
        expected = first_stop(tokenizer, ids, stops)
        assert walk(table, ids) == expected, tokenizer.convert_ids_to_tokens(ids)
        hits += expected is not None
    assert hits >= 4


# Random token sequences reach partial matches that no encoder would produce.
@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=30))
def test_random_sequences_over_awkward_tokens(ids: list[int]) -> None:
    pieces = [b"a", b"b", b"ab", b"aab", b"", b"bab"]
    stops = ("aabab", "bb")
    table = StopTable(pieces, stops)
    expected = None
    for count in range(1, len(ids) + 1):
        text = b"".join(pieces[i] for i in ids[:count]).decode()
        ends = [(text.find(stop) + len(stop), stop) for stop in stops if stop in text]
        if ends:
            expected = (count - 1, min(ends)[1])
            break
    assert walk(table, ids) == expected


# Taking the tokens' names for their text would miss added tokens and bytes beyond ASCII.
def test_byte_level_vocabulary_is_exact() -> None:
    tokenizer = byte_level()
    texts = vocabulary_bytes(tokenizer, len(tokenizer) + 3)
    assert texts[-3:] == [b""] * 3  # ids that only the model's padded embedding has
    for text in ["naïve 東京 </search>\n", "x</ärgernis>y"]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert b"".join(texts[i] for i in ids) == text.encode()


# Word-level decoders put a space between tokens: "</sea" + "rch>" is not the stop string.
def test_word_level_tokens_bring_their_space() -> None:
    tokenizer = word_level()
    texts = vocabulary_bytes(tokenizer, len(tokenizer))
    assert texts[1] == b" </search>"
    table = StopTable(texts, ("</search>",))
    assert walk(table, [3, 4, 5]) is None
    assert walk(table, [3, 1]) == (1, "</search>")


# Requests with different stops in one batch must not see each other's.
def test_matcher_keeps_requests_apart() -> None:
    texts = [b"x", b"y"]
    tables = [StopTable(texts, stops) for stops in (("x",), (), ("xy", "y"))]
    matcher = StopMatcher([tables[2], tables[0], tables[1], tables[0]])
    after = matcher.next_state[matcher.start, np.zeros(4, dtype=np.int64)]
    assert [matcher.name(int(state)) for state in after] == [None, "x", None, "x"]
    after = matcher.next_state[after, np.ones(4, dtype=np.int64)]
    assert [matcher.name(int(state)) for state in after] == ["xy", "x", None, "x"]


def test_empty_stop_string_is_an_error() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        StopTable([b"a"], ("",))
