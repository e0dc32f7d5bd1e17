"""`atpo-fast data prepare`: what is dropped and why, what is written, and where sets come from."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from atpo_fast.commands.cli import main
from atpo_fast.data.decontamination import NEAR, find_overlaps, normalise_question
from atpo_fast.data.readers import read_passages, read_questions

REAL = os.environ.get("ATPO_DATA")
ROOT = Path(__file__).resolve().parents[2]
PLACES = ["Oslo", "Rome", "Lima", "Cairo", "Quito", "Sofia", "Dakar", "Hanoi"]
HOTPOT = {
    "_id": "h1",
    "question": "Which bridge is older, Old Bridge or New Bridge?",
    "answer": "Old Bridge",
    "type": "comparison",
    "context": {
        "title": ["New Bridge", "Old Bridge", "River"],
        "sentences": [["One.", " Two."], ["Three."], ["Four."]],
    },
    "supporting_facts": {"title": ["Old Bridge", "New Bridge"], "sent_id": [0, 1]},
}
MUSIQUE = {
    "id": "2hop__1",
    "question": "Where was the painter of Grey Morning born?",
    "answer": "Oslo",
    "answer_aliases": ["Kristiania"],
    "paragraphs": [
        {"idx": 0, "title": "A", "paragraph_text": "Five.", "is_supporting": False},
        {"idx": 1, "title": "B", "paragraph_text": "Six.", "is_supporting": True},
    ],
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def prepare(folder: Path, *words: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Run the command over the files of a folder; the report by split and name."""
    assert main(["data", "prepare", "--root", str(folder), "--out", str(folder / "out"), *words]) == 0
    facts = json.loads((folder / "out/report.json").read_text())
    return {(found["split"], found["name"]): found for found in facts["sets"]}


# ---- overlaps


def test_templates_do_not_make_questions_alike() -> None:
    """Fails if questions that share a template count as near, or those about the same thing do not."""
    templates = ["Where was the director of film {} born?", "What nationality is the director of film {}?"]
    names = ["Grey Morning", "Blue Harbour", "The Last Kettle", "Iron Meadow", "Seven Lanterns", "Paper Moonlight"]
    protected = {"2wiki": [t.format(n) for t in templates for n in names]}
    training = [
        "Where was the director of film Copper Rain born?",
        "where was the director of the film grey morning BORN",
        "Where was the Director of Film Iron Meadow born",
        "Who wrote a book?",
    ]
    found = find_overlaps(training, protected)
    assert [overlap and overlap.kind for overlap in found] == [None, "near", "exact", None]
    assert found[1] is not None and found[1].question == "Where was the director of film Grey Morning born?"
    assert [o and o.kind for o in find_overlaps(training, protected, None)] == [None, None, "exact", None]


def test_questions_without_spaces_between_words_are_compared_too() -> None:
    """Fails if a Japanese question is a single word, which is like no other."""
    protected = {"ja": ["富士山の高さは何メートルですか?", "琵琶湖の面積はどれくらいですか?"]}
    near, other = find_overlaps(["富士山の高さは何メートルですか、教えて", "京都の人口はどれくらいですか?"], protected)
    assert near is not None and near.kind == "near" and other is None


@pytest.mark.parametrize("threshold", [0.3, 0.65, 0.9])
def test_the_index_finds_what_comparing_all_pairs_finds(threshold: float) -> None:
    """Fails if the rarest words of a question are cut too short, so that a near-duplicate is missed."""
    words = ["alpha", "beta", "gamma", "delta", *PLACES]
    texts = [" ".join(combination) for combination in itertools.combinations(words, 4)]
    protected, training = texts[::7], texts[3::11]
    asked = [normalise_question(text) for text in [*protected, *training]]
    uses = Counter(word for text in asked for word in text.split())
    weight = {word: math.log((len(asked) + 1) / n) for word, n in uses.items()}

    def similarity(one: str, other: str) -> float:
        first, second = set(normalise_question(one).split()), set(normalise_question(other).split())
        return sum(weight[w] for w in first & second) / sum(weight[w] for w in first | second)

    for text, overlap in zip(training, find_overlaps(training, {"p": protected}, threshold), strict=True):
        best = max(similarity(text, other) for other in protected)
        if text in protected:
            assert overlap is not None and overlap.kind == "exact"
        elif best >= threshold + 1e-9:
            assert overlap is not None and overlap.similarity == pytest.approx(best)
        elif best < threshold - 1e-9:
            assert overlap is None


# ---- what is written


def test_every_layout_becomes_one_and_nothing_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if paragraphs, evidence, its order, aliases or types are lost, or bad records stop the rest."""
    broken = {"id": "x", "question": "No answer?", "answer": ""}
    files = f"{write(tmp_path / 'h.jsonl', [HOTPOT, broken])},{write(tmp_path / 'm.jsonl', [MUSIQUE])}"
    facts = prepare(tmp_path, "--train", f"both={files}")["train", "both"]
    assert (facts["read"], facts["unusable"], facts["kept"]) == (3, 1, 2)
    assert (facts["evidence"], facts["paragraphs"], facts["yes_no"]) == (1.0, 1.0, 0.0)
    assert "h.jsonl, line 2: the field answer holds no answer" in capsys.readouterr().out
    hotpot, musique = read_questions(tmp_path / "out/train/both.jsonl")
    assert (hotpot.id, hotpot.answers, hotpot.source) == ("h1", ("Old Bridge",), "both")
    assert hotpot.meta == {"type": "comparison", "evidence_titles": ["Old Bridge", "New Bridge"]}
    assert (musique.answers, musique.meta) == (("Oslo", "Kristiania"), {"evidence_titles": ["B"]})
    passages = read_passages(tmp_path / "out/train/both.jsonl")
    assert [(p.title, p.text) for p in passages] == [
        ("New Bridge", "One. Two."), ("Old Bridge", "Three."), ("River", "Four."), ("A", "Five."), ("B", "Six.")
    ]  # fmt: skip
    row = json.loads((tmp_path / "out/train/both.jsonl").read_text().splitlines()[0])
    assert row["supporting_facts"] == [["Old Bridge", 0], ["New Bridge", 1]]
    assert [p["is_supporting"] for p in row["paragraphs"]] == [True, True, False]


def test_what_evaluations_ask_is_taken_out_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if an equal or a near question stays, a further set is not protected, or repetitions hide an overlap."""
    train = ["Who built Oslo Castle?", "who built oslo castle", "When was the Old Mill of Dakar built?", "Why Lima?",
             "Why Lima?", "Is Hanoi large?"]  # fmt: skip
    asked = ["Who built Oslo castle", "In which year was the old mill of Dakar built?"]
    rows = [{"question": text, "answer": "yes"} for text in train]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "eval.jsonl", [{"question": text, "answer": "a"} for text in asked])
    write(tmp_path / "more.jsonl", [{"question": "is Hanoi LARGE?", "answer": "a"}])
    options = ["--train", "t=train.jsonl", "--eval", "e=eval.jsonl", "--against", "m=more.jsonl", "--near", "0.5"]
    facts = prepare(tmp_path, *options)
    found = facts["train", "t"]
    assert (found["read"], found["exact"], found["near"], found["repeated"], found["kept"]) == (6, 3, 1, 1, 1)
    assert found["exact_by_set"] == {"e": 2, "m": 1} and found["yes_no"] == 1.0
    assert found["near_examples"][0]["protected"] == asked[1]
    assert [q.text for q in read_questions(tmp_path / "out/train/t.jsonl")] == ["Why Lima?"]
    assert ("eval", "m") not in facts and facts["eval", "e"]["kept"] == 2
    assert "3 that an evaluation asks, 1 that are near" in capsys.readouterr().out


def test_held_out_questions_are_drawn_by_the_seed_and_protected(tmp_path: Path) -> None:
    """Fails if a held-out question or its near-duplicate stays in training, or a seed does not repeat."""
    rows = [{"question": f"Where is {a} of {b}?", "answer": "a"} for a in PLACES for b in PLACES if a != b]
    write(tmp_path / "t.jsonl", rows)
    facts = prepare(tmp_path, "--train", "t=t.jsonl", "--held-out", "t=9", "--near", "none")
    first = (tmp_path / "out/eval/t.jsonl").read_bytes()
    assert (facts["train", "t"]["held_out"], facts["train", "t"]["kept"], facts["eval", "t"]["kept"]) == (9, 47, 9)
    texts = {split: {q.text for q in read_questions(tmp_path / f"out/{split}/t.jsonl")} for split in ("train", "eval")}
    assert not texts["train"] & texts["eval"] and len(texts["train"] | texts["eval"]) == 56
    prepare(tmp_path, "--train", "t=t.jsonl", "--held-out", "t=9", "--near", "none")
    assert (tmp_path / "out/eval/t.jsonl").read_bytes() == first
    prepare(tmp_path, "--train", "t=t.jsonl", "--held-out", "t=9", "--near", "none", "--seed", "1")
    assert (tmp_path / "out/eval/t.jsonl").read_bytes() != first
    found = prepare(tmp_path, "--train", "t=t.jsonl", "--held-out", "t=9", "--near", "0.9")["train", "t"]
    assert found["near"] > 0, "Where is Oslo of Rome and Where is Rome of Oslo have the same words"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train", "t=missing.jsonl"], "missing.jsonl does not exist"),
        (["--train", "t=t.jsonl", "--held-out", "t=2"], "t has 2 questions, of which 2 cannot be held out"),
        (["--train", "t=t.jsonl", "--held-out", "u=1"], "u is not among the training sets"),
        (["--train", "t=t.jsonl", "--eval", "t=t.jsonl", "--held-out", "t=1"], "has evaluation questions of its own"),
        (["--train", "t=t.jsonl", "t=t.jsonl"], "t: named twice"),
        (["--train", "t=none.jsonl"], "no record can be used"),
        (["--train", "popqa"], "popqa has no training questions"),
        ([], "nothing to prepare"),
    ],
)
def test_bad_input(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "t.jsonl", [{"question": f"{place}?", "answer": "a"} for place in PLACES[:2]])
    write(tmp_path / "none.jsonl", [{"question": "Who?"}])
    assert main(["data", "prepare", "--root", str(tmp_path), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--train", "own"], ["--train", "a/b=c"], ["--near", "2"], ["--held-out", "t"]])
def test_bad_options(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["data", "prepare", "--out", str(tmp_path), *words])


# ---- the hub


class Hub(BaseHTTPRequestHandler):
    """The hub's answers for one file of the collection; all else is not found."""

    FILE = "/datasets/RUC-NLPIR/FlashRAG_datasets/resolve/main/bamboogle/test.jsonl"
    CONTENT = b'{"id": "test_0", "question": "who was first", "golden_answers": ["ann"]}\n'

    def do_HEAD(self) -> None:
        found = self.path == self.FILE
        self.send_response(200 if found else 404)
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(self.CONTENT) if found else 0))
        self.send_header("ETag", '"0123456789abcdef0123456789abcdef01234567"')
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        if self.path == self.FILE:
            self.wfile.write(self.CONTENT)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Write nothing."""


def test_sets_without_files_come_from_the_hub(tmp_path: Path) -> None:
    """Fails if another repository, folder or split is asked for, or a fault of the hub shows as a traceback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    }

    # Both in one process of their own, in which the hub's client is told by its environment where the hub is.
    code = (
        "import sys; from atpo_fast.commands.cli import main\n"
        "codes = [main(['data', 'prepare', '--out', sys.argv[1], '--eval', name]) for name in ('bamboogle', 'nq')]\n"
        "print('exit codes', codes)"
    )
    try:
        command = [sys.executable, "-c", code, str(tmp_path / "out")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.stdout.endswith("exit codes [0, 2]\n"), done.stderr[-2000:]
        (question,) = read_questions(tmp_path / "out/eval/bamboogle.jsonl")
        assert (question.text, question.answers, question.source) == ("who was first?", ("ann",), "bamboogle")
        assert "name local files: --eval nq=FILE" in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        server.shutdown()


# ---- real files


@pytest.mark.skipif(not REAL, reason="set ATPO_DATA to a folder with the real data sets")
@pytest.mark.parametrize(("name", "documented"), [("arpo_train_10k", 107), ("arpo_hard_search_1k", 221)])
def test_documented_overlap_is_dropped(name: str, documented: int, tmp_path: Path) -> None:
    """Fails if one of the rows that are known to be of HotpotQA's evaluation set stays in training."""
    root = Path(str(REAL))
    options = ["--root", str(root), "--out", str(tmp_path), "--eval", "hotpotqa=eval/hotpot_dev_full7405_qa.json.gz"]
    assert main(["data", "prepare", *options, "--train", f"t=train/{name}.parquet"]) == 0
    overlap = json.loads((root / "train/OVERLAP_WITH_TESTS.json").read_text())
    rows = overlap["files"][f"train/{name}.parquet"]["overlap"]["hotpotqa_dev7405"]
    found = next(f for f in json.loads((tmp_path / "report.json").read_text())["sets"] if f["split"] == "train")
    assert found["exact"] >= len(rows) == documented
    assert NEAR == 0.65 and found["near"] < 0.02 * found["read"]
