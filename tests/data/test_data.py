"""Data files of every layout, the errors they can cause, prompts, and tasks made of files."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from atpo_fast.common.errors import DataError
from atpo_fast.config import Config, DataConfig, ModelConfig, TaskConfig
from atpo_fast.data.decontamination import normalise_question
from atpo_fast.data.prompts import PROMPTS, SYSTEM_PROMPT
from atpo_fast.data.questions import Passage, Question, content_of
from atpo_fast.data.readers import read_passages, read_questions
from atpo_fast.data.tokenizers import train_bpe
from atpo_fast.environment.extraction import EXTRACTIONS
from atpo_fast.task import PromptEncoder
from atpo_fast.task.demonstrations import evidence_demonstrations, read_demonstrations
from atpo_fast.task.task import load_task

REAL = os.environ.get("ATPO_DATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="set ATPO_DATA to a folder with the real data sets")

HOTPOT = {
    "_id": "h1",
    "question": " Who wrote it ",
    "answer": "Ann",
    "context": [["A", ["One. ", "Two."]], ["B", ["Three."]]],
}
MUSIQUE = {
    "id": "2hop__1",
    "question": "Where?",
    "answer": "Paris",
    "answer_aliases": ["Paris, France", "Paris"],
    "paragraphs": [
        {"idx": 0, "title": "A", "paragraph_text": "One. Two."},
        {"idx": 1, "title": "C", "paragraph_text": "Four."},
    ],
}
FLASHRAG = {"id": "test_0", "question": "When?", "golden_answers": ["1901", " 1901 AD "]}
ARPO = {
    "data_source": "popqa",
    "prompt": [{"role": "system", "content": "Be good."}, {"role": "user", "content": "What is it?"}],
    "reward_model": {"ground_truth": "x<|answer_split|>y ", "style": "rule"},
    "extra_info": {"index": 7, "split": "dev"},
}
AT2PO = {
    "prompt": [{"role": "system", "content": "Be good, user.\nuser\nWhich one?"}],
    "reward_model": {"ground_truth": {"target": ["z"]}, "style": "rule"},
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Write rows (or raw text) to a file of the kind its name says."""

    def writer(name: str, content: Any) -> Path:
        path = tmp_path / name
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
            return path
        if not isinstance(content, str):
            rows = [json.dumps(row) for row in content]
            content = "\n".join(rows) if ".jsonl" in name else f"[{','.join(rows)}]"
        path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
        return path

    return writer


# Each file type with each compression once; parquet compresses by itself.
@pytest.mark.parametrize("name", ["q.json", "q.json.gz", "q.jsonl", "q.jsonl.gz", "q.parquet"])
def test_every_file_type_reads_the_same(name: str, write: Callable[[str, Any], Path]) -> None:
    rows = [{"id": "1", "question": "Was it Zoë?", "answer": "yes"}, {"id": "2", "question": "And now", "answer": "no"}]
    questions = read_questions(write(name, rows))
    assert [(q.id, q.text, q.answers, q.source) for q in questions] == [
        ("1", "Was it Zoë?", ("yes",), "q"),
        ("2", "And now?", ("no",), "q"),
    ]


@pytest.mark.parametrize(
    ("row", "name", "text", "answers"),
    [
        (HOTPOT, "h1", "Who wrote it?", ("Ann",)),
        (MUSIQUE, "2hop__1", "Where?", ("Paris", "Paris, France")),
        (FLASHRAG, "test_0", "When?", ("1901", "1901 AD")),
        (ARPO, "7", "What is it?", ("x", "y")),
        (AT2PO, "q-1", "Which one?", ("z",)),
        ({"qid": "s", "question": "Is it?", "answer": False}, "s", "Is it?", ("no",)),  # StrategyQA
        ({"idx": 3, "question": "How many?", "answers": [4, "four"]}, "3", "How many?", ("4", "four")),
    ],
)
def test_every_question_layout(
    row: dict[str, Any], name: str, text: str, answers: tuple[str, ...], write: Callable[[str, Any], Path]
) -> None:
    (question,) = read_questions(write("q.jsonl", [row]))
    assert (question.id, question.text, question.answers) == (name, text, answers)


def test_every_passage_layout(write: Callable[[str, Any], Path]) -> None:
    # Fails when sentences are glued, titles keep their quotes, or rows without paragraphs stop the rest.
    wiki = read_passages(
        write("w.jsonl", [{"id": "9", "contents": '"A"\nOne. Two.'}, {"id": "8", "contents": "Bare\nlines"}])
    )
    assert wiki == [Passage(id="9", title="A", text="One. Two."), Passage(id="8", title="", text="Bare\nlines")]
    assert wiki[0].contents == '"A"\nOne. Two.' and wiki[1].contents == "Bare\nlines"
    assert read_passages(write("t.json", [{"title": "A", "text": "x"}])) == [Passage(id="t-1", title="A", text="x")]
    hotpot = read_passages(write("h.jsonl", [HOTPOT, FLASHRAG]))
    assert [(p.id, p.title, p.text) for p in hotpot] == [("h1:0", "A", "One. Two."), ("h1:1", "B", "Three.")]
    columns = {**HOTPOT, "context": {"title": ["A"], "sentences": [["One.", " Two."]]}}
    assert [p.text for p in read_passages(write("c.jsonl", [columns]))] == ["One. Two."]
    ctxs = {"question": "?", "answers": ["a"], "ctxs": [{"title": "T", "text": "x", "isgold": True}]}
    assert [(p.title, p.text) for p in read_passages(write("n.jsonl", [ctxs]))] == [("T", "x")]


def _bad(rows: Any) -> Any:
    return [{"question": "Fine?", "answer": "a"}, rows]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", "", r"q\.jsonl: the file is empty"),
        ("q.json", "[]", r"q\.json: the file holds no records"),
        ("q.jsonl", '{"question": "a?", "answer": "b"}\n{"question": ', r"q\.jsonl, line 2: malformed JSON"),
        ("q.jsonl", "\n\n[1]", r"q\.jsonl, line 3: expected a JSON object, found an array"),  # blank lines count
        ("q.json", '{"question": "a?"}', r"q\.json: expected a JSON array of objects, found an object"),
        ("q.txt", "question", r"q\.txt: expected a file of one of the types \.json, \.jsonl, \.csv, \.tsv, \.parquet"),
        ("q.jsonl", _bad({"answer": "a"}), r"line 2: no question; expected .* field question"),
        ("q.jsonl", _bad({"question": "  ", "answer": "a"}), r"line 2: no question"),
        ("q.json", _bad({"question": "q?"}), r"record 2: no answer; expected one of the fields golden_answers"),
        ("q.jsonl", _bad({"question": "q?", "answer": []}), r"line 2: the field answer holds no answer"),
        ("q.jsonl", _bad({"question": "q?", "golden_answers": [" "]}), r"the field golden_answers holds no answer"),
        ("q.jsonl", _bad({"question": "q?", "answer": {"a": 1}}), r"the field answer is dict; expected text or a list"),
        ("q.jsonl", _bad({"question": "q?", "answer": [None]}), r"the field answer is NoneType"),
        (
            "q.parquet",
            [{**ARPO, "reward_model": {"ground_truth": ""}}],
            r"record 1: .*reward_model\.ground_truth holds no answer",
        ),
    ],
)
def test_bad_questions_name_file_line_and_field(
    name: str, content: Any, message: str, write: Callable[[str, Any], Path]
) -> None:
    with pytest.raises(DataError, match=message):
        read_questions(write(name, content))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (FLASHRAG, r"p\.jsonl: no passages found; expected the fields contents"),
        ({"title": "A", "text": " "}, r"line 1: the passage in text has no text"),
        ({**HOTPOT, "context": [["A"]]}, r"line 1: context\[0\] is not a paragraph"),
        ({**HOTPOT, "context": "text"}, r"line 1: the field context is str"),
        ({**MUSIQUE, "paragraphs": [{"title": "A"}]}, r"line 1: the passage in paragraphs\[0\] has no text"),
    ],
)
def test_bad_passages_name_file_line_and_field(
    row: dict[str, Any], message: str, write: Callable[[str, Any], Path]
) -> None:
    with pytest.raises(DataError, match=message):
        read_passages(write("p.jsonl", [row]))


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl does not exist"):
        read_questions(tmp_path / "nothing.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"question": "a?"}' * 50)[:-12])
    with pytest.raises(DataError, match="not a complete gzip file"):
        read_questions(tmp_path / "cut.jsonl.gz")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 is not all of it")
    with pytest.raises(DataError, match="not a readable parquet file"):
        read_questions(tmp_path / "no.parquet")
    (tmp_path / "latin.jsonl").write_bytes('{"question": "Zoë?"}'.encode("latin-1"))
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        read_questions(tmp_path / "latin.jsonl")


def test_published_prompt() -> None:
    # Fails when the backslash of \boxed becomes a backspace, as in the published scripts, or the layout changes.
    question = Question(id="q", text="Who?", answers=("a",))
    (message,) = PROMPTS["published"].fill(question)
    text = content_of(message)
    assert "\x08" not in text and text.count("\\boxed{") == 2
    assert text.endswith("\nuser\nWho?")
    tags = ["<think> </think>", "<answer> </answer>", "<search> </search>", "<result> </result>"]
    first = ["helpful assistant", "step by step", "wikipedia search tool", "First think", "as many times"]
    order = [*first, *tags, "\\[ \\boxed{answer here} \\]", "\\boxed{}"]
    places = [SYSTEM_PROMPT.index(part) for part in order]
    assert places == sorted(places)


def test_prompt_rendering_and_limits() -> None:
    tokenizer = train_bpe([SYSTEM_PROMPT], 600)
    question = Question(id="q7", text="Who?", answers=("a",))
    short = PromptEncoder(PROMPTS["short"], tokenizer, max_tokens=10)(question)
    assert tokenizer.decode(short) == "Who?\n"
    plain = PromptEncoder(PROMPTS["published"], tokenizer, max_tokens=2000)(question)
    assert tokenizer.decode(plain) == f"{SYSTEM_PROMPT}\nuser\nWho?\n"
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[bot]{% endif %}"
    )
    chat = PromptEncoder(PROMPTS["published"], tokenizer, max_tokens=2000)(question)
    assert tokenizer.decode(chat) == f"[system]{SYSTEM_PROMPT}\nuser\nWho?[bot]"
    with pytest.raises(
        ValueError, match=r"question 'q7' \('Who\?'\): its prompt has \d+ tokens, data.max_prompt_tokens=20"
    ):
        PromptEncoder(PROMPTS["published"], tokenizer, max_tokens=20)(question)


def _config(root: Path, **data: Any) -> Config:
    return Config(data=DataConfig(root=str(root), **data), model=ModelConfig(vocab_size=400))


def test_task_of_files(write: Callable[[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fails when evaluation questions stay in training, paragraphs repeat, or limits cut before the overlap is dropped.
    monkeypatch.delenv("ATPO_DATA", raising=False)
    leaked = {"question": "WHEN", "answer": "1901"}
    write("train.jsonl", [leaked, HOTPOT, MUSIQUE])
    write("test.jsonl", [FLASHRAG])
    files: dict[str, Any] = {
        "train_files": ["train.jsonl"],
        "eval_files": ["test.jsonl"],
        "corpus_files": ["train.jsonl", "train.jsonl"],
    }
    task = load_task(_config(tmp_path, **files, max_train_questions=1))
    assert [q.id for q in task.train] == ["h1"] and [q.id for q in task.eval] == ["test_0"]
    assert [(p.title, p.text) for p in task.passages] == [("A", "One. Two."), ("B", "Three."), ("C", "Four.")]
    assert task.notes["dropped_train_eval_overlap"] == 1.0
    assert (
        task.notes["dropped_duplicate_passages"] == 3.0
    )  # the second reading; A of MuSiQue is dropped in its own file
    assert task.demonstrations == []
    assert task.tokenizer.decode(task.encode_prompt(task.eval[0])).endswith("\nuser\nWhen?\n")
    with pytest.raises(ValueError, match=r"'h1'.*data\.max_prompt_tokens=5"):
        load_task(_config(tmp_path, **files, max_prompt_tokens=5))
    with pytest.raises(DataError, match=r"train_files or data\.eval_files"):
        load_task(_config(tmp_path))
    monkeypatch.setenv("ATPO_DATA", str(tmp_path / "elsewhere"))
    assert len(load_task(_config(tmp_path, **files)).train) == 2  # which has none of them
    (tmp_path / "elsewhere").mkdir()
    write("elsewhere/train.jsonl", [HOTPOT])
    assert len(load_task(_config(tmp_path, **files)).train) == 1
    with pytest.raises(FileNotFoundError, match=r"elsewhere.*nor.*none\.jsonl"):
        load_task(_config(tmp_path, train_files=["none.jsonl"]))


def test_question_normalisation() -> None:
    assert normalise_question("  Who's “that”,\tZOË_1? ") == "who s that zoë 1"
    assert normalise_question("東京は?") != normalise_question("大阪は?")  # fails when only ASCII counts


def test_world_needs_the_short_prompt() -> None:
    with pytest.raises(ValueError, match=r"task\.prompt=short"):
        load_task(Config(data=DataConfig(source="world")))


@needs_real_data
@pytest.mark.parametrize(
    ("name", "questions", "passages"),
    [  # rows as documented beside the files; passages None where a file has none
        ("train/hotpot_train_hippo100.json", 100, 994),
        ("train/musique_train_hippo100.json.gz", 100, 1000),
        ("train/2wiki_train_migres500.json.gz", 500, 1000),
        ("train/hotpot_2wiki_train_r1searcher8148.jsonl.gz", 8148, None),
        ("eval/seven_benchmarks_deepresearcher_test3197.parquet", 3197, None),
        ("eval/nq_test_litm2655_gold_ctx.jsonl.gz", 2655, 1000),
        ("eval/bamboogle_test125_flashrag.jsonl", 125, None),
        ("eval/2wiki_dev_migres200_ctx.jsonl", 200, 1000),
        ("eval/strategyqa_dev_migres229.jsonl", 229, None),
    ],
)
def test_real_files(name: str, questions: int, passages: int | None) -> None:
    path = Path(str(REAL)) / name
    assert len(read_questions(path)) == questions
    if passages is None:
        with pytest.raises(DataError, match="no passages found"):
            read_passages(path)
    else:
        assert len(read_passages(path)) >= passages


@needs_real_data
def test_real_corpora() -> None:
    folder = Path(str(REAL)) / "corpus"
    assert len(read_passages(folder / "2wiki_corpus_hipporag6119.json.gz")) == 6119
    wiki = read_passages(folder / "wiki18_passages_sample.jsonl.gz")
    assert wiki[0].title == "Citigroup" and not wiki[0].text.startswith('"')


@needs_real_data
def test_documented_overlap_is_found() -> None:
    # The data come with a list of training rows that are questions of the HotpotQA test set.
    files: dict[str, Any] = {
        "train_files": ["train/arpo_hard_search_1k.parquet"],
        "eval_files": ["eval/hotpot_dev_full7405_qa.json.gz"],
    }
    task = load_task(
        Config(data=DataConfig(**files), task=TaskConfig(prompt="short"), model=ModelConfig(vocab_size=512))
    )
    documented = json.loads((Path(str(REAL)) / "train/OVERLAP_WITH_TESTS.json").read_text())
    rows = documented["files"]["train/arpo_hard_search_1k.parquet"]["overlap"]["hotpotqa_dev7405"]
    assert task.notes["dropped_train_eval_overlap"] == len(rows)


def short_prompts(tokenizer: PreTrainedTokenizerBase) -> PromptEncoder:
    return PromptEncoder(PROMPTS["short"], tokenizer, max_tokens=100)


# Fails when the prompt or an observation becomes an action (trained on), or the end of sequence is not taught.
def test_demonstrations_from_a_file(tmp_path: Path) -> None:
    tokenizer = train_bpe(["What is a? look here <result> found </result> done"], 300)
    turns = [{"action": "look here", "observation": " <result> found </result>"}, {"action": "done"}]
    path = tmp_path / "demonstrations.jsonl"
    path.write_text(json.dumps({"question": "What is a?", "turns": turns}) + "\n")
    (tree,) = read_demonstrations(path, short_prompts(tokenizer))
    assert tokenizer.decode(tree.turns[0].observation_ids) == "What is a?\n"
    assert tokenizer.decode(tree.turns[1].action_ids) == "look here"
    assert tokenizer.decode(tree.turns[1].observation_ids) == " <result> found </result>"
    assert tree.turns[2].action_ids[-1] == tokenizer.eos_token_id


# Fails when evidence is not read from one of the layouts, or a title is searched that is no evidence.
def test_demonstrations_from_evidence(tmp_path: Path) -> None:
    """Fails if a chain answers what its results do not hold, or yes and no are looked for in them."""
    musique = json.loads(json.dumps(MUSIQUE))
    musique["paragraphs"][1]["is_supporting"] = True
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([HOTPOT | {"supporting_facts": [["B", 0], ["A", 1], ["B", 2]]}, musique]))
    questions = [*read_questions(path), Question(id="unknown", text="Why?", answers=("no",))]
    titles = {"evidence_titles": ["D"]}
    questions += [Question(id="not found", text="Why?", answers=("Par",), meta=titles)]  # no word of the result
    questions += [Question(id="yes", text="Is it?", answers=("yes",), meta=titles)]
    tokenizer = train_bpe(["<think> I look for A. </think> found"], 400)
    searched: list[str] = []

    def search(query: str) -> str:
        searched.append(query)
        return f"found {query} in Paris by Ann"

    chains = evidence_demonstrations(questions, search, short_prompts(tokenizer), EXTRACTIONS["boxed"])
    assert searched == ["B", "A", "C", "D", "D"]
    assert [chain.question_id for chain in chains] == ["h1", "2hop__1", "yes"]
    assert tokenizer.decode(chains[1].turns[1].observation_ids) == " <result>\nfound C in Paris by Ann\n</result>"
    assert r"\boxed{Paris}" in tokenizer.decode(chains[1].turns[2].action_ids)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"turns": [{"action": "a"}]}, "line 1: field question"),
        ({"question": "q", "turns": []}, "line 1: field turns"),
        ({"question": "q", "turns": [{"action": "a"}, {"action": "b"}]}, r"turns\[0\] must have an observation"),
        ({"question": "q", "turns": [{"action": "a", "observation": "o"}]}, r"turns\[0\] must not have"),
        ({"question": "q", "turns": [{"action": ""}]}, r"turns\[0\] needs a non-empty text action"),
    ],
)
def test_broken_demonstrations_name_the_place(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    tokenizer = train_bpe(["a b c"], 300)
    path = tmp_path / "demonstrations.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        read_demonstrations(path, short_prompts(tokenizer))
