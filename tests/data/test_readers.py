"""Files as other tools and people write them: verl, TRL, CSV, Hugging Face, and what they get wrong."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from atpo_fast.common.errors import DataError
from atpo_fast.config import ColumnsConfig
from atpo_fast.data.chat_templates import render
from atpo_fast.data.questions import Question
from atpo_fast.data.readers import read_passages, read_question_files, read_questions
from atpo_fast.data.tokenizers import train_bpe

SYSTEM = {"role": "system", "content": "Be good."}
USER = {"role": "user", "content": "What is 2+2"}
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [SYSTEM, USER],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"split": "train", "index": 17, "answer": "2+2=4\n#### 4"},
}


def write(path: Path, rows: list[Any]) -> Path:
    """Write rows as the kind of file that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one(path: Path, columns: ColumnsConfig | None = None) -> Question:
    """The only question of a file."""
    (question,) = read_questions(path, columns or ColumnsConfig())
    return question


def answers(tmp_path: Path, row: dict[str, Any]) -> tuple[str, ...]:
    """The answers of a record beside a question."""
    return one(write(tmp_path / "q.jsonl", [{"question": "Q?", **row}])).answers


def test_verl_parquet(tmp_path: Path) -> None:
    """Fails if the chat or a column is lost, a "?" is added to a chat, or two records share an id."""
    later = {**VERL, "extra_info": {**VERL["extra_info"], "index": 18}}  # type: ignore[dict-item]
    first, second = read_questions(write(tmp_path / "train.parquet", [VERL, later]))
    assert (first.id, second.id) == ("17", "18")
    assert (first.text, first.answers, first.source) == ("What is 2+2", ("4",), "openai/gsm8k")
    assert first.messages == (SYSTEM, USER)
    assert first.record == VERL


def test_keys_that_parquet_filled_in_are_not_part_of_a_chat(tmp_path: Path) -> None:
    """Fails if `tool_calls: null`, which a template may ask for, becomes part of the messages."""
    called = {"role": "assistant", "content": None, "tool_calls": "[]"}
    rows = [{"prompt": [USER, called, {"role": "user", "content": "And?"}], "answer": "4"}]
    question = one(write(tmp_path / "q.parquet", rows))
    assert question.messages == (USER, called, {"role": "user", "content": "And?"})
    assert question.text == "And?"


@pytest.mark.parametrize("name", ["parts.parquet", "parts.jsonl"])
def test_parts_of_a_message_are_one_text(name: str, tmp_path: Path) -> None:
    """Fails if the question has another text than the prompt that a chat template writes of its parts, or if a text
    that Parquet filled in becomes the word None."""
    parts = [{"type": "text", "text": "What is "}, {"type": "image", "url": "a.png"}, {"type": "text", "text": "2+2"}]
    question = one(write(tmp_path / name, [{"prompt": [{"role": "user", "content": parts}], "answer": "4"}]))
    assert question.text == "What is 2+2"
    tokenizer = train_bpe([question.text], 300)
    tokenizer.chat_template = (  # as Gemma 3 and Llama 3.2 have it
        "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% endif %}{% endfor %}{% endfor %}"
    )
    assert render(question.messages, tokenizer) == question.text


@pytest.mark.parametrize("name", ["trl.parquet", "trl.jsonl"])
def test_trl_conversational_prompts(name: str, tmp_path: Path) -> None:
    """Fails if only the last message is kept, or TRL's `solution` is not taken as the answer."""
    chat = [SYSTEM, {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}, USER]
    question = one(write(tmp_path / name, [{"prompt": chat, "solution": r"So it is $\boxed{\frac{1}{2}}$."}]))
    assert question.messages == tuple(chat)
    assert (question.text, question.answers) == ("What is 2+2", (r"\frac{1}{2}",))


def test_trl_plain_prompts_stay_as_they_stand(tmp_path: Path) -> None:
    """Fails if a "?" is put behind an instruction."""
    question = one(write(tmp_path / "q.jsonl", [{"prompt": " Add 2 and 2. ", "ground_truth": 4}]))
    assert (question.text, question.messages, question.answers) == ("Add 2 and 2.", (), ("4",))


def test_trl_messages_without_what_answers_them(tmp_path: Path) -> None:
    """Fails if the reply of a supervised row is part of the prompt: the model would be shown the answer."""
    messages = [SYSTEM, USER, {"role": "assistant", "content": "It is 4."}]
    question = one(write(tmp_path / "q.jsonl", [{"messages": messages, "answer": "4"}]))
    assert question.messages == (SYSTEM, USER) and question.text == "What is 2+2"
    assert question.record["messages"] == messages


def test_a_data_set_saved_to_disk(tmp_path: Path) -> None:
    """Fails if the rows of a folder of `save_to_disk` are lost or out of order, or its splits are not told of."""
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for i, name in enumerate(names):
        table = pyarrow.Table.from_pylist([{"prompt": [USER], "answer": str(i)}])
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    questions = read_questions(folder)
    assert [q.answers for q in questions] == [("0",), ("1",)]
    assert questions[0].messages == (USER,)
    (folder.parent / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match=r"several splits; name one of them: .*saved/train"):
        read_questions(folder.parent)
    with pytest.raises(DataError, match=r"no state\.json"):
        read_questions(tmp_path)


CSV = 'number,frage,lösung,quelle\n7,"Was, bitte?","[""ja"", ""doch""]",a\n8,"Zwei\nZeilen",007,b\n9,Leer,1.0,\n'
COLUMNS = ColumnsConfig(question="frage", answers="lösung", id="number", source="quelle")


@pytest.mark.parametrize("name", ["q.csv", "q.csv.gz", "q.tsv"])
def test_csv_with_columns_of_any_name(name: str, tmp_path: Path) -> None:
    """Fails if numbers lose their zeros, quoted line breaks part a record, or lists stay text."""
    content = CSV.replace(",", "\t").replace("\t ", ", ") if name == "q.tsv" else CSV
    content = "\ufeff" + content  # as Excel writes it
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    questions = read_questions(tmp_path / name, COLUMNS)
    found = [(q.id, q.text, q.answers, q.source) for q in questions]
    assert found == [
        ("7", "Was, bitte?", ("ja", "doch"), "a"),
        ("8", "Zwei\nZeilen?", ("007",), "b"),
        ("9", "Leer?", ("1.0",), "q"),
    ]
    assert questions[0].record["frage"] == "Was, bitte?"


def test_whole_numbers_that_became_floats_in_a_csv_file(tmp_path: Path) -> None:
    """Fails if a label written as 42.0, because another was missing, can never be matched by 42."""
    path = tmp_path / "q.csv"
    path.write_text("question,answer,score\nA?,42.0,1.5\nB?,7.0,2.0\n")
    questions = read_questions(path)
    assert [q.answers for q in questions] == [("42",), ("7",)]
    assert questions[1].record["score"] == "2.0"  # a column with a fraction is left alone


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a;b\n1;2\n", r"no question; expected .*question.*; found the columns a;b; .*data\.columns\.question"),
        ("question,text\nA?,b\n", r"line 2: no answer; .*found the columns question, text; .*data\.columns\.answers"),
        ("question,answer\nA?,1,000\n", r"line 2: 3 cells, but the first line names 2 columns .*must be quoted"),
        ("question,question\nA?,b\n", r"names columns more than once: question"),
        ("question,\nA?,b\n", r"must name every column"),
        ("question,answers\nA?,\"['a' 'b']\"\n", r"line 2: .*NumPy printed; write the list as JSON"),
        ('question,answer\n"A?,b\n', r"malformed CSV"),
    ],
)
def test_csv_files_that_do_not_fit(content: str, message: str, tmp_path: Path) -> None:
    """Fails if a shifted cell or a wrong column is read without a word, or the columns found are not listed."""
    (tmp_path / "q.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read_questions(tmp_path / "q.csv")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (ColumnsConfig(question="q"), r"in the field q \(data\.columns\.question\); found the columns prompt, answer"),
        (ColumnsConfig(answers="a.b"), r"expected the field a\.b \(data\.columns\.answers\); found the columns"),
        (ColumnsConfig(id="n"), r"expected the field n \(data\.columns\.id\)"),
    ],
)
def test_named_columns_that_are_not_there(columns: ColumnsConfig, message: str, tmp_path: Path) -> None:
    """Fails if a column that was named wrongly is silently replaced by a recognised one."""
    with pytest.raises(DataError, match=message):
        one(write(tmp_path / "q.jsonl", [{"prompt": "Who?", "answer": "Ann"}]), columns)


def test_named_columns_reach_inside_and_may_hold_chats(tmp_path: Path) -> None:
    columns = ColumnsConfig(question="input.chat", answers="output.gold", id="output.key")
    row = {"input": {"chat": [SYSTEM, USER]}, "output": {"gold": [4, "four"], "key": 3.0}, "answer": "wrong"}
    question = one(write(tmp_path / "q.jsonl", [row]), columns)
    assert (question.id, question.text, question.answers) == ("3", "What is 2+2", ("4", "four"))
    assert question.messages == (SYSTEM, USER)


@pytest.mark.parametrize(
    "facts",
    [
        {"title": ["Old Bridge", "Hill Tunnel", "Old Bridge"], "sent_id": [0, 2, 1]},
        [["Old Bridge", 0], ["Hill Tunnel", 2]],
        [{"title": "Old Bridge", "sent_id": 0}, {"title": "Hill Tunnel", "sent_id": 2}],
        '[["Old Bridge", 0], ["Hill Tunnel", 2]]',
    ],
)
@pytest.mark.parametrize("within", [None, "metadata"])
def test_supporting_facts_in_every_layout(facts: Any, within: str | None, tmp_path: Path) -> None:
    """Fails if evidence as Hugging Face or FlashRAG stores it is ignored: no cold start from evidence."""
    inner = {"supporting_facts": facts, "context": {"title": ["Old Bridge"], "sentences": [["One. ", "Two."]]}}
    row = {"question": "Q?", "answer": "a", **({within: inner} if within else inner)}
    path = write(tmp_path / "q.jsonl", [row])
    question = one(path)
    assert question.meta["evidence_titles"] == ["Old Bridge", "Hill Tunnel"]
    assert "context" not in question.record and "context" not in question.record.get("metadata", {})
    assert [p.text for p in read_passages(path)] == ["One. Two."]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"answer": 42.0}, ("42",)),
        ({"answer": [42.0, 0.5, True]}, ("42", "0.5", "yes")),
        ({"answer": 1e20}, ("100000000000000000000",)),
        ({"answer": "3*14=42\n#### 42"}, ("42",)),
        ({"answer": "so\n#### 1,234,567\n"}, ("1234567",)),
        ({"answer": "#### not 1,5 but two"}, ("not 1,5 but two",)),
        ({"answer": "The #### sign"}, ("The #### sign",)),
        ({"solution": r"First \boxed{1}, then \boxed{x^{2}}."}, ("x^{2}",)),
        ({"solution": r"Nested \boxed{\boxed{3}+1}, open \boxed{4"}, (r"\boxed{3}+1",)),
        ({"answer": {"value": "Ann", "aliases": ["Ann", "Anna"], "normalized_aliases": ["ann"]}}, ("Ann", "Anna")),
        ({"possible_answers": '["politician", "pol"]'}, ("politician", "pol")),
        ({"answer": "[1, 2]"}, ("[1, 2]",)),  # the answer of a programming task, not a list of answers
    ],
)
def test_the_answer_of_a_record(row: dict[str, Any], expected: tuple[str, ...], tmp_path: Path) -> None:
    """Fails if a gold answer is one that nobody can give: 42.0, a whole solution, a list in a text."""
    assert answers(tmp_path, row) == expected


def test_a_label_that_is_not_a_number_is_no_answer(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "Q?", "answer": NaN}\n')
    with pytest.raises(DataError, match="line 1: no answer"):
        read_questions(tmp_path / "q.jsonl")


def test_json_lines_in_a_json_file(tmp_path: Path) -> None:
    """Fails if one object a line, under the name .json, is refused; and if a broken line is not told of."""
    path = write(tmp_path / "train.json", [{"question": f"{n}?", "answer": n} for n in (1, 2)])
    assert [q.answers for q in read_questions(path)] == [("1",), ("2",)]
    with path.open("a") as file:
        file.write('{"question": ')
    with pytest.raises(DataError, match=r"train\.json, line 3: malformed JSON"):
        read_questions(path)


def test_an_array_inside_an_object(tmp_path: Path) -> None:
    """Fails if TriviaQA's own files, whose names have capitals, cannot be read."""
    rows = [{"Question": "Who?", "QuestionId": "tc_1", "Answer": {"Value": "Ann", "Aliases": ["Anna"]}}]
    (tmp_path / "wikipedia-dev.json").write_text(json.dumps({"Data": rows, "Version": 1.0}, indent=1))
    question = one(tmp_path / "wikipedia-dev.json")
    assert (question.id, question.text, question.answers) == ("tc_1", "Who?", ("Ann", "Anna"))


def test_ids_are_unique_over_several_files(tmp_path: Path) -> None:
    """Fails if two files that both say id 1 share sampling seeds, or a resumed job passes one of them over."""
    for name in ("nq/test.jsonl", "popqa/test.jsonl"):
        write(tmp_path / name, [{"id": "1", "question": f"{name}?", "answer": "a"}, {"question": "?", "answer": "b"}])
    write(tmp_path / "own.jsonl", [{"id": n, "question": f"{n}?", "answer": "a"} for n in (1, 2, 2)])
    found = read_question_files([tmp_path], ["nq/test.jsonl", "popqa/test.jsonl", "own.jsonl"])
    assert [q.id for q in found] == [
        "nq/test:1", "nq-2", "popqa/test:1", "popqa-2", "own:1", "own:2", "own:2#2"
    ]  # fmt: skip
    assert [q.source for q in found] == ["nq", "nq", "popqa", "popqa", "own", "own", "own"]
    assert [q.id for q in read_question_files([tmp_path], ["own.jsonl", "own.jsonl"])] == [
        "own:1", "own:2", "own:2#2", "own:1#2", "own:2#3", "own:2#4"
    ]  # fmt: skip


def test_answers_that_normalise_to_nothing_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fails if nobody hears that any stray "the" is an exact match of such an answer."""
    rows = [{"question": "Which band?", "answer": answer} for answer in ("!!!", "The The", "A", "ABBA")]
    rows.append({"question": "What costs it?", "answer": ["$", "a dollar"]})  # type: ignore[dict-item]
    with caplog.at_level(logging.WARNING):
        read_questions(write(tmp_path / "bands.jsonl", rows))
    assert "answers to 3 of 5 questions nothing is left" in caplog.text and "'bands-1'" in caplog.text
