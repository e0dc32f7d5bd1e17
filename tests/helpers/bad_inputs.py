"""Every kind of input that a user gives, spoilt in every way that is likely, and what the one line about it must say.

A case is a command in a folder of its own: the files there, the words after `atpo-fast`, and pieces of the line that
name what is wrong, where, and what to do. tests/README.md lists the cases by input.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN = ("train", "--config", "run.yaml")
FOLDER = None  # in place of a content: a folder

QUESTION = json.dumps({"id": "q", "question": "Who?", "golden_answers": ["Ann"]})
PASSAGE = json.dumps({"id": "p", "contents": "Ann is who."})
CONFIG = """\
run_dir: run
device: cpu
deepspeed: ROOT/configs/deepspeed/zero0.json
data: {train_files: [train.jsonl], eval_files: [eval.jsonl], corpus_files: [corpus.jsonl]}
model: {dtype: float32, hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, head_dim: 8, intermediate_size: 16}
rollout: {strategy: chain, initial_chains: 1, max_turn_tokens: 4, max_response_tokens: 16}
cold_start: {steps: 1, batch_size: 1}
train: {steps: 1, questions_per_step: 1, questions_per_minibatch: 1, check_packing: false}
"""
GOOD: Mapping[str, str | bytes | None] = {
    "run.yaml": CONFIG,
    "train.jsonl": QUESTION,
    "eval.jsonl": QUESTION.replace("Who", "Where"),
    "corpus.jsonl": PASSAGE,
}


@dataclass(frozen=True)
class Case:
    """A command with one spoilt input."""

    given: str
    """Kind of input, a line of the list in tests/README.md."""
    fault: str
    words: Sequence[str]
    says: Sequence[str]
    """Pieces of the line."""
    files: Mapping[str, str | bytes | None] = field(default_factory=dict)
    """Files beside the good ones, or in their place."""


def _key(fault: str, override: str, *says: str) -> Case:
    return Case("KEY=VALUE", fault, (*RUN, override), says)


def _file(given: str, name: str, words: Sequence[str], **faults: str | bytes | None) -> list[Case]:
    """Cases of a file that a command reads: missing, and with each of some contents."""
    spoilt = {fault.replace("_", " "): {name: content} for fault, content in faults.items()}
    return [Case(given, fault, words, (name,), files) for fault, files in {"missing": {}, **spoilt}.items()]


def _read(given: str, name: str, override: str, **faults: str | bytes | None) -> list[Case]:
    """Cases of a file that `train` reads."""
    return _file(given, name, (*RUN, override), **faults)


CONFIGURATION = "configuration (--config)"
QUESTIONS = "questions (data.train_files, data.eval_files)"
MODEL = "model (model.path)"
PYTHON = "Python of one's own (task.rewards, tools.functions, environment.factory, task.file)"
CASES = [
    *_file(CONFIGURATION, "none.yaml", ("train", "--config", "none.yaml")),
    *_file(
        CONFIGURATION,
        "run.yaml",
        RUN,
        a_folder=FOLDER,
        not_UTF8=b"\xff\xfe\x00",
        no_YAML="a: [1",
        a_list="- 1\n- 2\n",
        a_key_twice="seed: 1\nseed: 2\n",
        a_key_that_is_not_known="modle: {}\n",
        a_base_that_is_missing="base: none.yaml\n",
        a_base_of_itself="base: run.yaml\n",
    )[1:],
    Case(CONFIGURATION, "left out", ("train",), ("--config",)),
    Case("verb", "not known", ("fly",), ("fly",)),
    Case("option", "not known", (*RUN, "--steps", "3"), ("--steps",)),
    _key("without =", "train.steps", "train.steps"),
    _key("not known", "rollout.temprature=1", "rollout.temperature"),
    _key("of another type", "train.steps=many", "train.steps"),
    _key("out of range", "train.steps=0", "train.steps"),
    _key("no YAML", "data.train_files=[a", "data.train_files"),
    _key("two that do not go together", "train.questions_per_minibatch=3", "train.questions_per_minibatch"),
    _key("a method that does not exist", "method=at3po", "at3po"),
    _key("a secret", "tools.search_url=http://me:secret@host/retrieve", "tools.search_token_variable"),
    _key("a run folder that is a file", "run_dir=train.jsonl", "train.jsonl"),
    _key("a device that is not there", "device=cuda", "device=cuda"),
    _key("a tool without its index", "tools.search_backend=dense", "tools.index_dir"),
    _key("a token that is not set", "tools={search_backend: http, search_token_variable: NONE_SUCH}", "NONE_SUCH"),
    *_read(
        "DeepSpeed (deepspeed)", "ds.json", "deepspeed=ds.json", a_folder=FOLDER, no_JSON="{", a_list="[]", empty=""
    ),
    *_read(
        QUESTIONS,
        "q.jsonl",
        "data.train_files=[q.jsonl]",
        empty="",
        a_folder=FOLDER,
        no_JSON="{",
        numbers="[1, 2]",
        without_question='{"id": 1, "golden_answers": ["a"]}',
        without_answers='{"question": "Who?"}',
        answers_of_another_type='{"question": "Who?", "golden_answers": {"a": 1}}',
        an_empty_question='{"question": "", "golden_answers": ["a"]}',
        not_UTF8=b'{"question": "\xff", "golden_answers": ["a"]}',
    ),
    *_read(QUESTIONS, "q.parquet", "data.train_files=[q.parquet]", no_Parquet=b"PAR1" + bytes(20) + b"PAR1")[1:],
    *_read(QUESTIONS, "q.csv", "data.eval_files=[q.csv]", without_the_columns="a,b\n1,2\n")[1:],
    *_read(QUESTIONS, "q.json.gz", "data.train_files=[q.json.gz]", no_gzip=b"text")[1:],
    *_read(QUESTIONS, "q.txt", "data.train_files=[q.txt]", of_an_unknown_kind="Who?")[1:],
    *_read(
        "passages (data.corpus_files)",
        "c.jsonl",
        "data.corpus_files=[c.jsonl]",
        empty="",
        without_text='{"id": 1}',
        no_JSON="x",
    ),
    *_read(
        "demonstrations (cold_start.demonstrations)",
        "d.jsonl",
        "cold_start.demonstrations=d.jsonl",
        empty="",
        no_JSON="{",
        without_turns='{"question": "Who?"}',
        turns_of_another_type='{"question": "Who?", "turns": [1]}',
    ),
    *_read(MODEL, "m", "model.path=m", an_empty_folder=FOLDER, a_file="x"),
    Case(MODEL, "without a tokenizer", (*RUN, "model.path=m"), ("holds no tokenizer",), {"m/config.json": "{}"}),
    *_read(MODEL, "m.gguf", "model.path=m.gguf", no_GGUF=b"GGUF" + bytes(40)),
    *_read("index (tools.index_dir)", "index", "tools.index_dir=index", an_empty_folder=FOLDER, a_file="x"),
    *_read("cache (tools.published_cache)", "a.json", "tools.published_cache=a.json", no_JSON="{", a_list="[]"),
    *_read("cache (tools.cache)", "a.db", "tools.cache=a.db", no_SQLite="text " * 100)[1:],
    *_read(
        PYTHON,
        "r.py",
        "task.rewards=[r.py:f]",
        a_syntax_error="def f(:\n",
        without_the_name="g = 1\n",
        raises="1 / 0\n",
    ),
    *_read(PYTHON, "r.py", "tools.functions=[r.py:f]", without_the_name="g = 1\n", no_function="f = 1\n")[1:],
    *_read(PYTHON, "e.py", "environment.factory=e.py:f", without_the_name="g = 1\n"),
    *_read(PYTHON, "t.py", "task.file=t.py", without_the_name="g = 1\n"),
    *_file(
        "hosts (--hostfile)", "hosts", (*RUN, "--hostfile", "hosts"), empty="", no_slots="a slots=0", nonsense="a b c"
    ),
    Case("nodes (--nodes)", "no number", (*RUN, "--nodes", "x", "--node-rank", "0", "--master", "h"), ("--nodes=x",)),
    Case("nodes (--nodes)", "without --master", (*RUN, "--nodes", "2"), ("--master",)),
    Case("trees (rollout --out)", "of an unknown kind", ("rollout", *RUN[1:], "--out", "t.txt"), ("t.txt", ".jsonl")),
    Case("number (rollout --questions)", "no number", ("rollout", *RUN[1:], "--questions", "x"), ("--questions",)),
    Case("name (eval --name)", "a path", ("eval", *RUN[1:], "--name", "a/b"), ("a/b",)),
    Case("sets (eval.sets)", "missing", ("eval", *RUN[1:], "eval.sets={nq: [none.jsonl]}"), ("none.jsonl",)),
    Case("model (eval)", "none trained yet", ("eval", *RUN[1:]), ("run",)),
    *_file(
        "answers (eval compare)", "a.jsonl", ("eval compare", "a.jsonl", "a.jsonl"), no_JSON="{}\n{\n{}", other=QUESTION
    ),
    *_file(
        "traces (import)",
        "t.jsonl",
        ("import", "t.jsonl", "--out", "o.jsonl"),
        empty="",
        no_JSON="{\n{}",
        of_another_program=QUESTION,
    ),
    Case("traces (import)", "--out is there", ("import", "train.jsonl", "--out", "corpus.jsonl"), ("corpus.jsonl",)),
    Case(
        "traces (import)", "--out of an unknown kind", ("import", "train.jsonl", "--out", "o.txt"), ("o.txt", ".jsonl")
    ),
    *_file("run (report)", "r", ("report", "r"), an_empty_folder=FOLDER),
    *_file("run (report)", "r/metrics.jsonl", ("report", "r"), no_JSON="{\n{}\n")[1:],
    *_file("trees (report)", "t.jsonl", ("report", "t.jsonl"), no_trees=QUESTION),
    *_file("trees (report)", "t.parquet", ("report", "t.parquet"), no_Parquet=b"x")[1:],
    *_file("checkpoint (export)", "r", ("export", "r", "target"), an_empty_folder=FOLDER),
    *_file(
        "sets (data prepare)", "a.json", ("data prepare", "--out", "o", "--train", "nq=a.json"), no_JSON="{", empty=""
    ),
    Case("sets (data prepare)", "none", ("data prepare", "--out", "o"), ("--train",)),
    Case("sets (data prepare)", "not known", ("data prepare", "--out", "o", "--train", "x"), ("x",)),
    Case("similarity (data prepare --near)", "no number", ("data prepare", "--out", "o", "--near", "x"), ("--near",)),
    *_file(
        "passages (retriever --corpus)",
        "c.jsonl",
        ("retriever", "--build-only", "--corpus", "c.jsonl"),
        no_JSON="x",
        empty="",
    ),
    Case("index (retriever --index-dir)", "missing", ("retriever", "--index-dir", "none"), ("none",)),
    Case("index (retriever --index-dir)", "left out", ("retriever",), ("--corpus",)),
    Case("port (retriever --port)", "out of range", ("retriever", "--index-dir", "i", "--port", "99999"), ("99999",)),
    Case("token (retriever)", "not set", ("retriever", "--index-dir", "i", "--token-variable", "NONE"), ("NONE",)),
]


def listed() -> str:
    """Return the list of tests/README.md: a line for each kind of input, with its faults."""
    faults: dict[str, list[str]] = {}
    for case in CASES:
        faults.setdefault(case.given, []).append(case.fault)
    lines = [f"| {given} | {'; '.join(dict.fromkeys(found))} |" for given, found in faults.items()]
    return "\n".join(["| input | faults |", "|---|---|", *lines])


if __name__ == "__main__":
    print(listed())
