"""`atpo-fast eval` from its command line: several sets at once, several answers, resuming, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from atpo_fast.commands.cli import main
from atpo_fast.config import load_config
from atpo_fast.evaluation.answers import read_answers
from atpo_fast.task import load_task
from atpo_fast.train.evaluate import answer_header, answering_config
from atpo_fast.train.from_config import build_model
from tests.helpers.completions_server import CompletionsServer
from tests.helpers.forked_runs import start_command
from tests.helpers.runs import TINY

Tiny = dict[str, Any]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random model in a folder, two files of questions of its world, and a configuration that names them."""
    folder = tmp_path_factory.mktemp("eval")
    settings = {**TINY, "run_dir": str(folder / "run"), "model": TINY["model"] | {"initializer_range": 0.2}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    config = load_config(folder / "tiny.yaml")
    task = load_task(config)
    for name, questions in {"nq": task.eval[:4], "own": task.train[:3]}.items():
        rows = [{"id": i, "question": q.text, "answer": q.answers[0]} for i, q in enumerate(questions)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings["data"] = {**TINY["data"], "root": str(folder), "max_eval_questions": 3}
    settings["eval"] = {"sets": {"nq": ["nq.jsonl"], "own": ["own.jsonl"]}, "batch_size": 2}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    build_model(config.model, task.tokenizer, 0).save_pretrained(folder / "model")
    task.tokenizer.save_pretrained(folder / "model")
    return {"folder": folder, "config": folder / "tiny.yaml", "model": folder / "model"}


def run(tiny: Tiny, *arguments: str, code: int = 0) -> str:
    """`atpo-fast eval`, its processes forked from one that has imported everything."""
    process = start_command("eval", "--config", str(tiny["config"]), f"model.path={tiny['model']}", *arguments)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == code, output[-3000:]
    return output


@pytest.fixture(scope="module")
def evaluated(tiny: Tiny) -> tuple[Path, str]:
    """The folder of an evaluation without interruption, four answers to a question, and its output."""
    output = run(tiny, "--name", "whole", "eval.samples=4", "eval.temperature=1")
    return tiny["folder"] / "run" / "eval", output


def test_all_sets_are_answered_in_one_run(evaluated: tuple[Path, str]) -> None:
    """Fails if a set or a limit is lost, a response is not kept whole, or the parts disagree."""
    folder, output = evaluated
    _, answered = read_answers(folder / "whole.jsonl")
    assert [(q.set, q.id) for q in answered if q.set != "world"] == [
        ("nq", "0"), ("nq", "1"), ("nq", "2"), ("own", "0"), ("own", "1"), ("own", "2")
    ]  # fmt: skip
    assert sum(q.set == "world" for q in answered) == 3
    samples = [sample for q in answered for sample in q.samples]
    assert len(samples) == 36 and all(0 < s.tokens <= s.response_tokens <= 160 for s in samples if not s.failed)
    assert len({sample.response for sample in samples}) > 12, "the samples of a question repeat each other"
    assert "<result>" in "".join(sample.response for sample in samples)
    numbers = json.loads((folder / "whole.json").read_text())
    assert numbers["sets"]["nq"]["questions"] == 3 and set(numbers["sets"]["own"]["pass_at"]) == {"1", "2", "4"}
    assert numbers["sets"]["own"]["in_training"] == 3 and numbers["sets"]["nq"]["in_training"] == 0
    assert numbers["averages"]["single-hop"]["complete"] is False
    page = (folder / "whole.md").read_text()
    assert page.strip() in output and "| nq | 3 |" in page and "maj@4" in page


def test_a_second_run_continues(tiny: Tiny, evaluated: tuple[Path, str]) -> None:
    """Fails if questions are answered twice, or otherwise than without the interruption, or in another order."""
    folder, _ = evaluated
    lines = (folder / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "part.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])  # header, four questions, half of one
    output = run(tiny, "--name", "part", "eval.samples=4", "eval.temperature=1", "ranks=2")
    assert "part.jsonl holds answers to 4 of 9 questions already" in output
    assert read_answers(folder / "part.jsonl") == read_answers(folder / "whole.jsonl")
    assert (folder / "part.md").read_text() == (folder / "whole.md").read_text()


def test_answers_of_another_model_are_put_aside(tiny: Tiny, evaluated: tuple[Path, str]) -> None:
    """Fails if answers of two models or settings are mixed in one file, or the earlier ones are lost."""
    folder, _ = evaluated
    earlier = (folder / "whole.jsonl").read_bytes()
    (folder / "other.jsonl").write_bytes(earlier)
    output = run(tiny, "--name", "other", "eval.sets={}", "data.max_eval_questions=1")
    assert "held answers of another evaluation (config_digest, samples, temperature changed): it is now" in output
    assert (folder / "other.1.jsonl").read_bytes() == earlier
    header, answered = read_answers(folder / "other.jsonl")
    assert header is not None and header["samples"] == 1 and len(answered) == 1


def test_a_server_gives_the_answers_of_the_paged_engine(tiny: Tiny) -> None:
    """Fails if an evaluation needs what only the engine in its own process has, or if engines answer otherwise."""
    options = ["eval.sets={}", "data.max_eval_questions=3"]
    run(tiny, "--name", "paged", *options)
    with CompletionsServer(
        lambda: AutoModelForCausalLM.from_pretrained(tiny["model"]), AutoTokenizer.from_pretrained(tiny["model"])
    ) as server:
        run(tiny, "--name", "server", *options, "engine.name=server", f"engine.urls=[{server.url}]")
        assert server.bodies
    folder = tiny["folder"] / "run" / "eval"
    (first, paged), (second, served) = (read_answers(folder / f"{name}.jsonl") for name in ("paged", "server"))
    assert len(paged) == 3 and served == paged
    assert first is not None and second is not None and first["config_digest"] != second["config_digest"]


def test_what_answers_depend_on_is_in_the_header(tiny: Tiny, tmp_path: Path) -> None:
    """Fails if changed weights or settings go unnoticed, or other questions or batches begin from nothing."""

    def header(*overrides: str) -> dict[str, Any]:
        return answer_header(answering_config(load_config(tiny["config"], overrides)), tiny["model"])

    first = header()
    assert header("eval.batch_size=7", "data.max_eval_questions=null", "eval.sets={a: [b]}", "optim.lr=1") == first
    for override in ("tools.top_k=7", "rollout.max_response_tokens=99", "data.max_prompt_tokens=31", "seed=3"):
        assert header(override)["config_digest"] != first["config_digest"], override
    weights = tiny["model"] / "model.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert header()["model_digest"] != first["model_digest"]
    finally:
        weights.write_bytes(before)
    assert header() == first


def test_nothing_to_evaluate_is_said_before_a_model_is_loaded(tiny: Tiny) -> None:
    """Fails if a mean over no questions is shown as a result of 0."""
    options = ["data.source=files", "data.train_files=[own.jsonl]", "data.eval_files=[]", "eval.sets={}"]
    output = run(tiny, *options, "--name=none", code=2)
    assert "nothing was evaluated: there are no evaluation questions; set eval.sets or data.eval_files" in output
    assert "0.000" not in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval.samples=2"], "eval.samples=2 needs eval.temperature above 0"),
        (["eval.sets={nq: []}"], "eval.sets: nq names no files"),
        (["eval.sets={nq: [missing.jsonl]}"], "missing.jsonl does not exist"),
        (["eval.sets={world: [nq.jsonl]}"], "eval.sets: world is also a source"),
        (["--name", "a/b"], "must be a name, without folders"),
    ],
)
def test_bad_input(tiny: Tiny, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a fault is found only after the model is loaded, or shows as a traceback."""
    process = start_command("eval", "--config", str(tiny["config"]), f"model.path={tiny['model']}", *arguments)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2 and words in output and "Traceback" not in output, output[-2000:]


def test_compare(evaluated: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the verb of two words is not found, or a model differs from itself."""
    path = str(evaluated[0] / "whole.jsonl")
    assert main(["eval", "compare", path, path]) == 0
    shown = capsys.readouterr().out
    assert shown.count(" | 1 | 0 / 0 | McNemar, exact |") == 8  # EM and F1 of three sets and of all
    assert main(["eval", "compare", "--json", path, path]) == 0
    assert json.loads(capsys.readouterr().out)["all"]["questions"] == 9
    assert main(["eval", "compare", path, str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl does not exist" in capsys.readouterr().err
    assert main(["eval", "compare", path, str(evaluated[0].parent)]) == 2
    assert "whole.jsonl" in capsys.readouterr().err


@pytest.mark.slow(reason="a training of one step")
def test_a_training_without_evaluation_questions_gives_no_numbers(tiny: Tiny, tmp_path: Path) -> None:
    """Fails if it ends with "EM on 0 evaluation questions: 0.000 before RL, 0.000 after"."""
    (tmp_path / "corpus.jsonl").write_text('{"title": "A", "text": "One."}\n')
    files = ["data.source=files", "data.train_files=[own.jsonl]", f"data.corpus_files=[{tmp_path / 'corpus.jsonl'}]"]
    options = [*files, "eval.sets={}", "train.steps=1", "optim.lr=1e-6"]
    batch = ["train.questions_per_step=2", "train.questions_per_minibatch=2", f"run_dir={tmp_path / 'run'}"]
    model = f"model.path={tiny['model']}"
    process = start_command("train", "--config", str(tiny["config"]), model, *options, *batch)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    assert "there are no evaluation questions (data.eval_files): nothing will be evaluated" in output
    assert "nothing was evaluated: there are no evaluation questions" in output and "EM on 0" not in output
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["cold_start_em"] is None and summary["final_em"] is None
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    evaluated = [record for record in records if record["phase"] == "eval"]
    assert evaluated and all(r["eval/em"] is None and r["eval/questions"] == 0 for r in evaluated)
    assert not (tmp_path / "run/eval").exists()
    assert (tmp_path / "run/report.html").is_file()
