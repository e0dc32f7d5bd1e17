"""BM25 over shards: the scores of bm25s's one index, whatever the shards; builds that were killed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_fast.retrieval import BM25Index, BM25Settings, bm25_build, build_index, open_index
from atpo_fast.retrieval.bm25 import Postings, hash_words, split_words
from atpo_fast.retrieval.scripts import by_script
from tests.helpers.retrieval_cases import random_queries, random_rows, write_corpus


def expected(texts: list[str], queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and scores by bm25s's own index of all texts, equal scores in the order of the corpus."""
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index(split_words(texts), show_progress=False)
    numbers, scores = np.full((len(queries), k), -1), np.zeros((len(queries), k), np.float32)
    for row, words in enumerate(split_words(queries)):
        known = [word for word in words if word in index.vocab_dict]
        if known:
            all_scores = index.get_scores(known)
            best = np.argsort(-all_scores, kind="stable")[:k]
            best = best[all_scores[best] > 0]
            numbers[row, : len(best)], scores[row, : len(best)] = best, all_scores[best]
    return numbers, scores


@pytest.mark.parametrize("k", [1, 3, 50])
def test_scores_in_memory_are_those_of_bm25s(k: int) -> None:
    """Fails if idf, length norm, a repeated word of the query or the order of equal scores differs in the last bit."""
    texts, queries = [row["contents"] for row in random_rows(300)], random_queries(60)
    numbers, scores = BM25Index.from_texts(texts).search(queries, k)
    wanted = expected(texts, queries, k)
    np.testing.assert_array_equal(numbers, wanted[0])
    np.testing.assert_array_equal(scores, wanted[1])


@pytest.mark.parametrize("shard_passages", [1, 7, 100, 1000])
def test_shards_score_as_one_index(tmp_path: Path, shard_passages: int) -> None:
    """Fails if idf or the mean length is a shard's own, or if hits of shards are merged in another order."""
    rows, queries = random_rows(150), random_queries(60)
    corpus = write_corpus(tmp_path / "c.jsonl", rows)
    build_index(tmp_path / "index", [corpus], BM25Settings(shard_passages=shard_passages))
    numbers, scores = open_index(tmp_path / "index").index.search(queries, 5)
    wanted = expected([row["contents"] for row in rows], queries, 5)
    np.testing.assert_array_equal(numbers, wanted[0])
    np.testing.assert_array_equal(scores, wanted[1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("ab é\n,9", max_size=12), min_size=1, max_size=12), st.text("ab é\n,9", max_size=8))
def test_any_text_scores_as_in_bm25s(texts: list[str], query: str) -> None:
    """Fails for passages without words, words next to line ends, and words that are no ASCII."""
    texts = [*texts, "é"]  # bm25s cannot index a corpus without any word
    numbers, scores = BM25Index.from_texts(texts).search([query], len(texts))
    wanted = expected(texts, [query], len(texts))
    np.testing.assert_array_equal(numbers, wanted[0])
    np.testing.assert_array_equal(scores, wanted[1])


@pytest.mark.parametrize(
    ("passage", "queries", "others"),
    [
        (
            "富士山は日本で最も高い山である。",
            ["富士山", "日本", "富士山の高さ", "山"],
            ["東京", "士富", "海"],
        ),
        ("上海是中国的城市", ["上海", "中国的", "城"], ["海中", "北京"]),
        ("서울은 대한민국의 수도이다.", ["서울", "대한민국", "수도"], ["부산", "울서"]),
        ("กรุงเทพเป็นเมืองหลวงของประเทศไทย", ["กรุงเทพ", "ประเทศไทย", "เมืองหลวง"], ["ลาว"]),
        ("iPhone発売は2007年", ["iphone", "発売", "2007", "iPhone発売"], ["ipho", "200"]),
    ],
)
def test_scripts_without_spaces(tmp_path: Path, passage: str, queries: list[str], others: list[str]) -> None:
    """Fails if a passage is found by a whole clause alone, or by what it does not contain."""
    texts = ["The rival of e1.", passage, "naïve é"]
    corpus = write_corpus(tmp_path / "c.jsonl", [{"contents": text} for text in texts])
    build_index(tmp_path / "index", [corpus], BM25Settings())
    for index in (BM25Index.from_texts(texts), open_index(tmp_path / "index").index):
        numbers, _ = index.search([*queries, *others], 1)
        assert numbers[:, 0].tolist() == [1] * len(queries) + [-1] * len(others)


def test_other_scripts_are_left_as_they_are() -> None:
    """Fails if the words of a text with spaces change: Latin, Greek, Cyrillic, Arabic, Devanagari."""
    for text in ("Zoë naïve — “1914–1918” ﬁ", "Σωκράτης", "Москва́", "القاهرة", "दिल्ली", "a_b ½ ¥ 。"):
        assert by_script(text) == by_script(text, singles=True) == text


def test_a_corpus_without_words_has_no_hits() -> None:
    """Fails (by a division by zero) if the mean length is taken of passages that all are empty."""
    numbers, _ = BM25Index.from_texts(["", "the of"]).search(["a", "word"], 2)
    assert (numbers == -1).all()


def test_word_hashes_are_the_same_everywhere() -> None:
    """Fails if words are hashed with Python's own hash, which differs from process to process."""
    assert hash_words(["title", "zoë"]).tolist() == [7530813165274739851, 16315885614148236114]


def test_a_killed_build_goes_on_after_the_last_whole_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if finished shards are counted again, or if what a killed build left spoils the scores."""
    rows, queries = random_rows(100), random_queries(30)
    corpus = write_corpus(tmp_path / "c.jsonl.gz", rows)
    counted: list[int] = []
    count_words, score = bm25_build.count_words, bm25_build.score

    def stop_counting(texts: Iterable[str]) -> Postings:
        if len(counted) == 2:
            raise KeyboardInterrupt
        counted.append(1)
        return count_words(texts)

    monkeypatch.setattr(bm25_build, "count_words", stop_counting)
    settings = BM25Settings(shard_passages=30)
    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path / "index", [corpus], settings)
    with pytest.raises(FileNotFoundError, match="unfinished"):
        open_index(tmp_path / "index")
    again: list[int] = []
    monkeypatch.setattr(bm25_build, "count_words", lambda texts: again.append(1) or count_words(texts))

    def stop_scoring(*arguments: Any) -> Postings:
        if len(list((tmp_path / "index" / "shards").glob("*.scores"))) == 2:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(bm25_build, "score", stop_scoring)
    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path / "index", [corpus], settings)
    assert len(again) == 2  # of four shards two were there
    monkeypatch.setattr(bm25_build, "score", score)
    build_index(tmp_path / "index", [corpus], settings)
    assert len(again) == 2
    numbers, scores = open_index(tmp_path / "index").index.search(queries, 4)
    wanted = expected([row["contents"] for row in rows], queries, 4)
    np.testing.assert_array_equal(numbers, wanted[0])
    np.testing.assert_array_equal(scores, wanted[1])
    assert not list((tmp_path / "index" / "shards").glob("*.counts"))


def test_an_index_is_memory_mapped(tmp_path: Path) -> None:
    """Fails if opening an index reads its postings into memory."""
    build_index(tmp_path / "i", [write_corpus(tmp_path / "c.jsonl", random_rows(20))], BM25Settings())
    index = open_index(tmp_path / "i").index
    assert isinstance(index, BM25Index)
    scores = index._shards[0]._index.scores
    for name in ("data", "indices", "indptr"):
        base = scores[name]
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap)
