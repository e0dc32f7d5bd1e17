"""Corpora on disk: every layout, random access, and index folders that belong to something else."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from atpo_fast.common.errors import DataError
from atpo_fast.config import ToolsConfig
from atpo_fast.data.questions import Passage
from atpo_fast.data.readers import read_passages
from atpo_fast.environment import BM25Search, ToolCall, make_toolbox
from atpo_fast.retrieval import BM25Settings, IndexMismatchError, Retriever, build_index, manifest, open_index
from tests.helpers.retrieval_cases import random_queries, random_rows, write_corpus

WIKI: list[dict[str, Any]] = [
    {"id": "9", "contents": '"Zoë"\nOne. Two.'},
    {"id": "8", "contents": "Bare\nlines", "more": 1},
]
TITLED: list[dict[str, Any]] = [{"title": "A", "text": "x y", "id": 7}, {"text": "no title"}]
CONTENTS = ['"Zoë"\nOne. Two.', "Bare\nlines", '"A"\nx y', "no title"]


def build(folder: Path, *corpus: Path, **settings: Any) -> Retriever:
    build_index(folder, corpus, BM25Settings(**settings))
    return open_index(folder)


def test_every_layout_is_numbered_through_and_kept_as_stored(tmp_path: Path) -> None:
    """Fails if an offset is off, if a file's documents are counted from 0 again, or if fields or ids get lost."""
    retriever = build(
        tmp_path / "i", write_corpus(tmp_path / "a.jsonl", WIKI), write_corpus(tmp_path / "b.jsonl.gz", TITLED)
    )
    documents = retriever.documents
    assert [documents[i] for i in (3, 0, 2, 1)] == [TITLED[1], WIKI[0], TITLED[0], WIKI[1]]
    assert [documents.contents(i) for i in range(4)] == CONTENTS
    assert [hits[0].number for hits in retriever.hits(["zoë", "lines", "a x", "title"], 1)] == [0, 1, 2, 3]
    for i in (-1, 4):
        with pytest.raises(IndexError):
            documents[i]


def test_answers_have_contents(tmp_path: Path) -> None:
    """Fails if a document without `contents`, which the published clients read, is sent without."""
    stored = [*TITLED, {"text": 'the word "contents" in text'}, WIKI[1]]
    documents = build(tmp_path / "i", write_corpus(tmp_path / "a.jsonl", stored)).documents
    answers = [json.loads(documents.answer(i)) for i in range(4)]
    assert answers[0] == TITLED[0] | {"contents": '"A"\nx y'}
    assert answers[2]["contents"] == 'the word "contents" in text'
    assert documents.answer(3) == json.dumps(WIKI[1], ensure_ascii=False).encode()


def test_blank_lines_byte_order_mark_and_missing_last_newline(tmp_path: Path) -> None:
    """Fails if blank lines count as documents, or if a file that Windows wrote cannot be read."""
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in WIKI]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\r\n  \n" + lines[1])
    documents = build(tmp_path / "i", path).documents
    assert [documents[i] for i in range(len(documents))] == WIKI
    assert documents.answer(0) == lines[0]


def test_question_files_and_json_arrays_are_copied(tmp_path: Path) -> None:
    """Fails if paragraphs of question files cannot be searched as `data.corpus_files` lets them be."""
    rows = [{"id": "q", "question": "?", "answer": "x", "context": [["T", ["One.", "Two."]], ["U", ["Three."]]]}]
    array = tmp_path / "b.json"
    array.write_text(json.dumps(TITLED))
    paths = [write_corpus(tmp_path / "a.jsonl", rows), array]
    documents = build(tmp_path / "i", *paths).documents
    wanted = [passage.contents for path in paths for passage in read_passages(path)]
    assert (
        [documents.contents(i) for i in range(len(documents))]
        == wanted
        == ['"T"\nOne. Two.', '"U"\nThree.', *CONTENTS[2:]]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"contents": "x"}\n{"title": "only"}\n',
            "c.jsonl, document 2: no text in a document: found the fields title",
        ),
        (b'{"contents": "x"}\n{"contents": \n', "c.jsonl, document 2: malformed JSON"),
        (b'{"contents": "x"}\n[1]\n', "c.jsonl, document 2: expected a JSON object"),
        (b'{"contents": "x"}\n{"contents": "\xff"}\n', "c.jsonl, document 2: not UTF-8"),
        (b"\n\n", "holds no documents"),
    ],
)
def test_bad_documents_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        build(tmp_path / "i", path)


def test_a_cut_gzip_file_is_told(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "c.jsonl.gz", random_rows(500))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="complete gzip"):
        build(tmp_path / "i", path)


def test_an_index_of_something_else_is_refused_or_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an index of another corpus, or with other settings, is served or is removed unasked; if a corpus of the
    same name and size passes for the same; or if a rebuild removes what is not its own."""
    monkeypatch.setattr(manifest, "_SAMPLE", 16)
    corpus = write_corpus(tmp_path / "c.jsonl.gz", WIKI)
    build(tmp_path / "i", corpus)
    with pytest.raises(IndexMismatchError, match=r"k1 0.9, not 1.2.*--rebuild"):
        build(tmp_path / "i", corpus, k1=1.2)
    other = write_corpus(tmp_path / "d.jsonl", TITLED)
    with pytest.raises(IndexMismatchError, match=r"corpus c.jsonl.gz \(.*, not d.jsonl"):
        build(tmp_path / "i", other)
    plain = write_corpus(tmp_path / "p.jsonl", WIKI)
    build(tmp_path / "p", plain)
    content = plain.read_bytes()
    plain.write_bytes(content.replace(b'"more"', b'"less"'))  # the same size
    with pytest.raises(IndexMismatchError, match="other contents"):
        build(tmp_path / "p", plain)
    (tmp_path / "i" / "notes.txt").write_text("mine")
    build_index(tmp_path / "i", [other], BM25Settings(), rebuild=True)
    assert (tmp_path / "i" / "notes.txt").exists()
    assert open_index(tmp_path / "i").documents[0] == TITLED[0]


def test_a_folder_that_is_no_index_is_left_alone(tmp_path: Path) -> None:
    """Fails if a wrong --index-dir empties somebody's folder."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    (tmp_path / "home" / "lock").write_text("")
    for rebuild in (False, True):
        with pytest.raises(IndexMismatchError, match="not an index folder"):
            build_index(tmp_path / "home", [write_corpus(tmp_path / "c.jsonl", WIKI)], BM25Settings(), rebuild=rebuild)
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_one_builder_at_a_time(tmp_path: Path) -> None:
    """Fails if two processes write one index."""
    corpus = write_corpus(tmp_path / "c.jsonl", WIKI)
    build(tmp_path / "i", corpus)
    with (tmp_path / "i" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(IndexMismatchError, match="another process"):
            build(tmp_path / "i", corpus)


def test_a_corpus_that_moved_or_changed(tmp_path: Path) -> None:
    """Fails if a moved corpus needs a new index, or if documents are read at the offsets of another file."""
    corpus = write_corpus(tmp_path / "c.jsonl", WIKI)
    build(tmp_path / "i", corpus)
    (tmp_path / "new").mkdir()
    moved = corpus.rename(tmp_path / "new" / "c.jsonl")
    with pytest.raises(FileNotFoundError, match="gone"):
        open_index(tmp_path / "i")
    assert build(tmp_path / "i", moved).documents[1] == WIKI[1]
    with moved.open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="changed"):
        open_index(tmp_path / "i")


def test_no_index_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="atpo-fast retriever"):
        open_index(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(IndexMismatchError, match="cannot be read"):
        open_index(tmp_path)


def test_the_search_tool_finds_the_same_in_memory_and_in_an_index_folder(tmp_path: Path) -> None:
    """Fails if in-process search over `tools.index_dir` formats, orders or cuts its hits differently."""
    rows = random_rows(80)
    build(tmp_path / "i", write_corpus(tmp_path / "c.jsonl", rows), shard_passages=30)
    texts = [row["contents"].split("\n", 1) for row in rows]
    memory = BM25Search([Passage(id="", title=title[1:-1], text=text) for title, text in texts], passage_chars=50)
    toolbox = make_toolbox(ToolsConfig(index_dir=str(tmp_path / "i"), passage_chars=50), [])
    queries = random_queries(40)
    found = toolbox.run([ToolCall("search", query) for query in queries])
    assert [result.text for result in found] == memory.run_many(queries)


def test_the_search_tool_refuses_an_index_of_another_kind(tmp_path: Path) -> None:
    build(tmp_path / "i", write_corpus(tmp_path / "c.jsonl", WIKI))
    with pytest.raises(ValueError, match=r"tools\.search_backend=bm25"):
        make_toolbox(ToolsConfig(search_backend="dense", index_dir=str(tmp_path / "i")), [])
    with pytest.raises(ValueError, match=r"tools\.index_dir"):
        ToolsConfig(search_backend="dense")


@pytest.mark.data
@pytest.mark.skipif("ATPO_DATA" not in os.environ, reason="set ATPO_DATA to a folder with the real data sets")
def test_real_wiki18_passages(tmp_path: Path) -> None:
    """Fails if the real corpus is not read as `data.readers` does, or if an index folder and memory find different
    passages."""
    data = Path(os.environ["ATPO_DATA"])
    corpus = data / "corpus" / "wiki18_passages_sample.jsonl.gz"
    retriever = build(tmp_path / "i", corpus, shard_passages=4000)
    assert len(retriever.documents) == 9648
    passages = read_passages(corpus)
    assert [retriever.documents[i]["id"] for i in (0, 9647)] == [passages[0].id, passages[-1].id]
    with gzip.open(data / "cache" / "wiki18_e5_top3_cache.jsonl.gz") as file:
        queries = [json.loads(line)["query"] for line in file][:200]
    toolbox = make_toolbox(ToolsConfig(index_dir=str(tmp_path / "i")), [])
    found = [result.text for result in toolbox.run([ToolCall("search", query) for query in queries])]
    assert found == BM25Search(passages).run_many(queries)
