"""The two tokenizers made here: word level for the embedded world, byte-level BPE for real texts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from atpo_fast.config import WorldConfig
from atpo_fast.data.tokenizers import TAGS, load_tokenizer, train_bpe
from atpo_fast.environment.search import BM25Search
from atpo_fast.environment.tags import CALL_LIMIT_NOTICE, format_result
from atpo_fast.world import World, make_tokenizer, make_world
from tests.helpers.forked_runs import ForkedProcess

_TEXTS = ["Was the café in Zürich (opened 1901) closed?", "A passage.\n\nWith 2 paragraphs, 'quotes' and 東京."]


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(WorldConfig())


@pytest.fixture(scope="module")
def words(world: World) -> PreTrainedTokenizerFast:
    return make_tokenizer(world)


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return train_bpe(_TEXTS * 5, 400)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _world_texts(world: World) -> list[str]:
    search = BM25Search(world.passages, top_k=10)
    return [
        *(f"{question.text}\n" for question in world.train[:200]),
        *(passage.contents for passage in world.passages),
        format_result(search("mentor of e17")),
        format_result(search("nothing known")),
        "<think> e17 then mentor then rival</think><search> mentor of e17</search>",
        "<think> e17 is e33</think><answer> \\boxed{ e33 }</answer>",
        "\\boxed{e33}",
        CALL_LIMIT_NOTICE,
        "Tool(search) was not called: nothing is between <search> and </search>.",
        " <search> mentor </search> \n",
    ]


def test_world_texts_come_back_exactly(world: World, words: PreTrainedTokenizerFast) -> None:
    # Fails when decoding puts spaces between tokens, or when a word of the environment is missing.
    for text in _world_texts(world):
        ids = _encode(words, text)
        assert words.unk_token_id not in ids, text
        assert words.decode(ids) == text
        assert words.decode(ids, skip_special_tokens=True) == text
    assert len(words) < 250


def test_pieces_do_not_depend_on_their_neighbours(world: World, words: PreTrainedTokenizerFast) -> None:
    # Fails when a prefix space is inserted, or when an added token eats the space beside it.
    question, thought, result = (
        f"{world.train[0].text}\n",
        "<think> e1 then rival</think><search> rival of e1</search>",
        (format_result("Page 1: The rival of e1 is e2.")),
    )
    pieces = [question, thought, result, "<think> e1 is e2</think><answer> \\boxed{ e2 }</answer>"]
    assert _encode(words, "".join(pieces)) == [token for piece in pieces for token in _encode(words, piece)]


@pytest.mark.parametrize("name", ["words", "bpe"])
def test_tags_are_single_ordinary_tokens(name: str, request: pytest.FixtureRequest) -> None:
    # Fails when tags are special: skip_special_tokens would delete what the reward and the tools look for.
    tokenizer = request.getfixturevalue(name)
    for tag in TAGS:
        (token,) = _encode(tokenizer, tag)
        assert tokenizer.decode([token, tokenizer.eos_token_id], skip_special_tokens=True) == tag
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


@pytest.mark.parametrize("name", ["words", "bpe"])
def test_saved_tokenizer_is_the_same(name: str, request: pytest.FixtureRequest, tmp_path: Path, world: World) -> None:
    # Fails when something (decoder, added tokens, clean-up of spaces) is lost on the way to the checkpoint.
    tokenizer = request.getfixturevalue(name)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    for text in _world_texts(world)[-9:]:
        assert _encode(loaded, text) == _encode(tokenizer, text)
        assert loaded.decode(_encode(loaded, text)) == text


def test_bpe_returns_any_text(bpe: PreTrainedTokenizerFast) -> None:
    # Fails when normalisation or clean-up changes text, for example spaces before punctuation.
    for text in [*_TEXTS, " leading", "a , b . c ?", "\x00\t🙂\r\n", format_result("x <think> y")]:
        assert bpe.decode(_encode(bpe, text)) == text
    assert len(bpe) <= 400


def trained_vocabulary() -> list[tuple[str, int]]:
    texts = [" ".join(chr(97 + (i * k) % 26) * (1 + k % 3) for k in range(40)) for i in range(60)]
    return sorted(train_bpe(texts, 500).get_vocab().items(), key=lambda item: item[1])


def print_vocabulary() -> int:
    print(hash("a"), trained_vocabulary())
    return 0


def test_bpe_is_the_same_in_every_process() -> None:
    # Fails when training depends on hash order: ranks train it separately and must agree. The server of forks is a
    # program of its own, so its order is another one.
    there, _ = ForkedProcess(print_vocabulary).communicate(timeout=300)
    order, _, vocabulary = there.partition(" ")
    assert int(order) != hash("a") or "PYTHONHASHSEED" in os.environ
    assert vocabulary.strip() == str(trained_vocabulary())


def test_unusable_tokenizers_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size=200"):
        train_bpe(_TEXTS, 200)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)
