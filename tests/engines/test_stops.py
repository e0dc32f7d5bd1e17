"""Stop strings on token ids: byte-level BPE, word-level and Metaspace tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from atpo_fast.engines.stops import (
    StopMatcher,
    StopTable,
    end_of_sequence_ids,
    missing_ids,
    vocabulary_bytes,
)
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


def test_several_ends_of_a_sequence() -> None:
    """Fails if only the tokenizer's end counts, or a default of the architecture ends turns at an ordinary token."""
    tokenizer = word_level()
    tokenizer.add_tokens(["<turn>"], special_tokens=True)

    def ends(eos: int | list[int] | None, of_model: bool) -> list[int]:
        generation = GenerationConfig(eos_token_id=eos)
        generation._from_model_config = of_model
        return end_of_sequence_ids(tokenizer, generation)

    (turn,) = tokenizer.convert_tokens_to_ids(["<turn>"])
    assert end_of_sequence_ids(tokenizer) == ends(None, False) == [0]
    assert ends([3, 0, 5], False) == ends([3, 0, 5], True) == [0, 3, 5]
    assert ends(2, False) == [0, 2] and ends(2, True) == [0] and ends(turn, True) == [0, turn]


def test_rows_without_a_token() -> None:
    """Fails if the rows of a padded embedding, or holes in the vocabulary, are taken for tokens."""
    tokenizer = byte_level()
    assert missing_ids(tokenizer, len(tokenizer)).tolist() == []
    assert missing_ids(tokenizer, len(tokenizer) + 2).tolist() == [len(tokenizer), len(tokenizer) + 1]
    assert missing_ids(tokenizer, len(tokenizer) - 2).tolist() == []
    holes = Tokenizer(models.WordLevel({"<eos>": 0, "a": 2, "b": 5}, unk_token="a"))
    holed = PreTrainedTokenizerFast(tokenizer_object=holes, eos_token="<eos>")
    assert missing_ids(holed, 7).tolist() == [1, 3, 4, 6]
    assert [len(text.strip()) for text in vocabulary_bytes(holed, 7)] == [5, 0, 1, 0, 0, 1, 0]
