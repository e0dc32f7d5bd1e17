"""Data files of every kind, damaged: read, or refused by an error that names the file and gives exit code 2."""

from __future__ import annotations

import gzip
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atpo_fast.common.errors import BAD_INPUT, InputError, exit_code
from atpo_fast.data.fields import ANSWER_NAMES, CHAT_NAMES, ID_NAMES, PARAGRAPH_FIELDS, QUESTION_NAMES
from atpo_fast.data.readers import read_passages, read_questions
from atpo_fast.retrieval.contents import document_contents
from tests.helpers.fuzzing import FUZZ, changed, damaged, values, written

NAMES = ["data", "role", "content", "title", "text", "contents", "type", "metadata", "supporting_facts", "target"]
KEYS = [*QUESTION_NAMES, *CHAT_NAMES, *ANSWER_NAMES, *ID_NAMES, *PARAGRAPH_FIELDS, *NAMES]
ROWS: list[dict[str, Any]] = [
    {
        "id": 7,
        "question": "Who wrote Faust?",
        "answer": "Goethe",
        "type": "bridge",
        "context": [["Faust", ["A play", "by Goethe"]], ["Goethe", ["A poet"]]],
        "supporting_facts": [["Faust", 1]],
    },
    {
        "prompt": [{"role": "user", "content": "1 + 1?"}],
        "reward_model": {"ground_truth": {"target": ["2", "two"]}},
        "data_source": "sums",
        "contents": '"Sums"\n1 + 1 = 2',
    },
]
TABLE: list[dict[str, Any]] = [
    {"question": "Who?", "golden_answers": ["Goethe", "J. W."], "id": "q1"},
    {"question": "a", "id": "q2"},
]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


FILES = {
    "a.json": written(ROWS),
    "b.jsonl": b"\n".join(map(written, ROWS)),
    "c.csv": b'id,question,answers\n1,"Who, then?","[""a"", ""b""]"\n2.0,What?,\'c\'\n',
    "d.tsv": b"id\tquestion\tanswers\n1\tWho?\t['a', 'b']\n",
    "e.parquet": parquet(TABLE),
    "f.json.gz": gzip.compress(written({"data": ROWS})),
    "g.parquet.gz": gzip.compress(parquet(TABLE)),
}


def check(path: Path, content: bytes) -> None:
    """Read a file as questions and as passages."""
    path.write_bytes(content)
    for read in (read_questions, read_passages):
        try:
            read(path)  # type: ignore[operator]
        except (InputError, FileNotFoundError) as error:
            assert exit_code(error) == BAD_INPUT and path.name in str(error)
            assert str(error).encode("utf-8", "replace")


@pytest.mark.parametrize("name", FILES)
@FUZZ
@given(st.data())
def test_damaged_files(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Fails if a broken file ends in an error that is not the project's, or does not say which file."""
    check(tmp_path / name, data.draw(damaged(FILES[name])))


@pytest.mark.parametrize("name", ["a.json", "b.jsonl"])
@FUZZ
@given(st.one_of(changed(ROWS, KEYS), st.lists(values(KEYS), max_size=3), values(KEYS)))
def test_any_json(tmp_path: Path, name: str, value: Any) -> None:
    """Fails if a column of an unexpected type ends in an error that is not the project's."""
    lines = value if isinstance(value, list) else [value]
    check(tmp_path / name, written(value) if name == "a.json" else b"\n".join(map(written, lines)))


@FUZZ
@given(st.data())
def test_damaged_data_sets(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Fails if a folder that `datasets` saved ends in another error when one of its files is broken."""
    folder = tmp_path_factory.mktemp("set")
    sink = BytesIO()
    table = pyarrow.Table.from_pylist(TABLE)
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    state = json.dumps({"_data_files": [{"filename": "data.arrow"}]}).encode()
    arrow, which = sink.getvalue(), data.draw(st.booleans())
    (folder / "state.json").write_bytes(state if which else data.draw(damaged(state)))
    (folder / "data.arrow").write_bytes(data.draw(damaged(arrow)) if which else arrow)
    try:
        read_questions(folder)
    except InputError as error:
        assert folder.name in str(error)


@FUZZ
@given(values(["contents", "text", "title", "_source", "payload", "content", "page_content"]))
def test_any_document(value: Any) -> None:
    """Fails if a hit of a foreign server ends in another error."""
    if isinstance(value, dict | str):
        try:
            assert isinstance(document_contents(value), str)
        except InputError as error:
            assert str(error)
