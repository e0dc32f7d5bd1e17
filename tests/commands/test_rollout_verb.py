"""Search trees into files: `atpo-fast rollout` from its command line, what is stored, and the report of it."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from atpo_fast.commands.cli import main
from atpo_fast.common.files import partial_path
from atpo_fast.config import load_config
from atpo_fast.policy import load_model
from atpo_fast.report import build_report
from atpo_fast.task import load_task
from atpo_fast.train.from_config import build_model
from atpo_fast.tree.storage import append_forest, forest_questions, iterate_forest, read_forest, read_forest_texts
from atpo_fast.tree.turn_tree import TurnTree
from tests.helpers.completions_server import CompletionsServer
from tests.helpers.forked_runs import ForkedProcess, start_command
from tests.helpers.runs import TINY
from tests.helpers.stored_trees import Letters, assert_equal, make_tree

FORMATS = pytest.mark.parametrize("name", ["trees.jsonl", "trees.parquet"])

# ---- files


def scored_tree() -> TurnTree:
    """Every field in use, with numbers that text formats lose."""
    tree = make_tree()
    tree.values = np.array([0.1, 1 / 3, 1.0, -1.0, 0.0])
    tree.advantages = tree.values * 1e-17
    tree.leaf_advantages = np.array([math.nan, math.nan, math.inf, -1.0, 0.0])
    tree.clip_low, tree.clip_high = tree.values * 0.1, np.array([math.nan, 1e-17, 0.2, 0.3, 0.4])
    return tree


@FORMATS
@pytest.mark.parametrize("texts", [True, False])
def test_round_trip_is_lossless(tmp_path: Path, name: str, texts: bool) -> None:
    # Fails if a field is forgotten, a float rounded, an empty turn dropped, or None becomes an empty list.
    trees = [make_tree(), scored_tree(), TurnTree([7], question_id="rootonly")]
    append_forest(tmp_path / name, trees[:1], Letters() if texts else None)
    append_forest(tmp_path / name, trees[1:], Letters() if texts else None)
    again = read_forest(tmp_path / name)
    assert len(again) == 3
    for tree, other in zip(trees, again, strict=True):
        assert_equal(tree, other)
    assert forest_questions(tmp_path / name) == {"q1": 2, "rootonly": 1}
    assert forest_questions(tmp_path / "none.jsonl") == {} == forest_questions(tmp_path / "none.parquet")


@FORMATS
def test_older_files_have_no_clip_ranges(tmp_path: Path, name: str) -> None:
    # Fails if files that were written before turns could have clip ranges cannot be read any more.
    append_forest(tmp_path / name, [make_tree()])
    if name.endswith("parquet"):
        (path,) = (tmp_path / name).glob("*.parquet")
        pq.write_table(pq.read_table(path).drop_columns(["clip_low", "clip_high"]), path)
    else:
        data = json.loads((tmp_path / name).read_text())
        del data["clip_low"], data["clip_high"]
        (tmp_path / name).write_text(json.dumps(data) + "\n")
    (again,) = read_forest(tmp_path / name)
    assert_equal(make_tree(), again)


@FORMATS
def test_texts_are_for_people_and_the_report(tmp_path: Path, name: str) -> None:
    # Fails if a turn's text belongs to another, or other programs cannot read question, answers and rewards.
    append_forest(tmp_path / name, [make_tree(), scored_tree()], Letters())
    (record,) = read_forest_texts(tmp_path / name, 1)
    assert [turn["text"] for turn in record["turns"]] == ["", "<search>x</search>", "yes", "n", ""]
    assert [turn["observation"] for turn in record["turns"]][:2] == ["Who?", "<r>é</r>"]
    assert record["turns"][1]["nll"] == 0.5 and record["turns"][2]["reward"] == 1.0
    if name.endswith("parquet"):
        rows = pq.read_table(tmp_path / name).to_pylist()
        assert rows[0]["question"] == "Who?" and rows[0]["answers"] == ["é", "\\ud800"]
    else:
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    turn = rows[1]["turns"][1]
    assert (turn["text"], turn["action_ids"][0], turn["tool"]) == ("<search>x</search>", ord("<"), "search")


def test_what_a_killed_writer_leaves_breaks_nothing(tmp_path: Path) -> None:
    # Fails if half a line or half a file hides the trees before it, or is joined with those that come after.
    lines, folder = tmp_path / "trees.jsonl", tmp_path / "trees.parquet"
    for path in (lines, folder):
        append_forest(path, [make_tree()], Letters())
    whole = lines.read_bytes()
    lines.write_bytes(whole + whole[: len(whole) // 2])
    part = (folder / "part-000000.parquet").read_bytes()
    partial_path(folder / "part-000001.parquet").write_bytes(part[: len(part) // 2])
    for path in (lines, folder):
        assert len(read_forest(path)) == 1 and forest_questions(path) == {"q1": 1}
        append_forest(path, [make_tree()], Letters())
        assert len(read_forest(path)) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["part-000000.parquet", "part-000001.parquet"]
    assert pq.read_table(folder).num_rows == 2


def test_damage_is_named(tmp_path: Path) -> None:
    # Fails if a damaged file is passed over, so that its questions are silently rolled out again.
    with pytest.raises(FileNotFoundError, match="none"):
        read_forest(tmp_path / "none.parquet")
    append_forest(tmp_path / "a.parquet", [make_tree()])
    (tmp_path / "a.parquet" / "part-000000.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=r"part-000000\.parquet"):
        read_forest(tmp_path / "a.parquet")
    pq.write_table(pa.table({"question_id": ["q"]}), tmp_path / "a.parquet" / "part-000000.parquet")
    with pytest.raises(ValueError, match="not a Parquet file of search trees"):
        read_forest(tmp_path / "a.parquet")


@FORMATS
def test_the_report_draws_a_file(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Fails if the trees of a file, or of a run folder that holds nothing else, are not drawn.
    append_forest(tmp_path / name, [make_tree()] * 9, Letters())
    assert main(["report", str(tmp_path / name)]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == tmp_path / "trees.html" and page.read_text().count("search\\u003ex") == 6
    folder = tmp_path / "run"
    append_forest(folder / name.replace("trees", "rollouts"), [make_tree()], Letters())
    assert "search\\u003ex" in build_report(folder).read_text()


# ---- the verb


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A configuration whose model is a random one, in a folder."""
    folder = tmp_path_factory.mktemp("rollout")
    settings = {**TINY, "run_dir": str(folder / "run"), "model": TINY["model"] | {"initializer_range": 0.2}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    config = load_config(folder / "tiny.yaml")
    tokenizer = load_task(config).tokenizer
    build_model(config.model, tokenizer, 0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return {"config": folder / "tiny.yaml", "model": folder / "model", "tokenizer": tokenizer, "folder": folder}


def start(tiny: dict[str, Any], *arguments: str) -> ForkedProcess:
    """`atpo-fast rollout`, its processes forked from one that has imported everything."""
    return start_command("rollout", "--config", str(tiny["config"]), f"model.path={tiny['model']}", *arguments)


def run(tiny: dict[str, Any], *arguments: str, code: int = 0) -> str:
    process = start(tiny, *arguments)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == code, output[-3000:]
    return output


def tokens(path: Path) -> dict[str, list[Any]]:
    """What must not depend on how a file came about, by question."""
    return {
        tree.question_id: [(t.parent, t.action_ids.tolist(), t.observation_ids.tolist(), t.reward) for t in tree.turns]
        for tree in iterate_forest(path)
    }


@pytest.fixture(scope="module")
def whole(tiny: dict[str, Any]) -> Path:
    """The trees of ten questions, written without interruption by one rank."""
    path = tiny["folder"] / "whole.jsonl"
    output = run(tiny, "--questions", "10", "--out", str(path))
    assert f"trees of 10 questions in {path}" in output and "batch 3/3" in output
    return path


@pytest.mark.slow(reason="two jobs, one of two ranks")
def test_questions_that_the_file_holds_are_passed_over(tiny: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    # Fails if an interrupted job repeats or loses questions, two ranks write other trees, or in another order.
    path = tmp_path / "trees.parquet"
    run(tiny, "--questions", "3", "--out", str(path))
    output = run(tiny, "--questions", "10", "--out", str(path), "ranks=2")
    assert "holds 3 of 10 questions already" in output
    assert tokens(path) == tokens(whole)
    assert [tree.question_id for tree in iterate_forest(path)] == [tree.question_id for tree in iterate_forest(whole)]
    (first, *_) = read_forest(whole)
    assert first.meta["question"] and all(first.turns[leaf].reward is not None for leaf in first.leaves)


@pytest.mark.slow(reason="a job that is interrupted and resumed")
def test_ctrl_c_keeps_what_is_done(tiny: dict[str, Any], tmp_path: Path) -> None:
    # Fails if finished trees are thrown away, the file breaks, or the user is not told how to go on.
    path = tmp_path / "trees.jsonl"
    process = start(tiny, "--questions", "all", "--out", str(path), "rollout.initial_chains=40")
    end = time.monotonic() + 600
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT
    held = len(read_forest(path))
    assert 0 < held < 40 and f"stopped: {held} of 40 questions are in {path}; the same command continues" in output


@pytest.mark.slow(reason="two jobs with a server")
def test_servers_write_the_same_trees_and_their_faults_stop_the_job(
    tiny: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    # Fails if the verb does not reach the servers, or their failure loses what is done or shows a traceback.
    # Six questions, two batches: one that is kept, and one that the fault ends.
    path = tmp_path / "trees.jsonl"
    with CompletionsServer(lambda: load_model(tiny["model"], torch.float32), tiny["tokenizer"]) as server:
        server.sampled_rows = len(tiny["tokenizer"])  # as the paged engine
        server.fault = lambda number: "500" if number > 25 else None  # four questions take 21, six 31
        options = ["engine.name=server", f"engine.urls=[{server.url}]", "engine.retries=1"]
        output = run(tiny, "--questions", "6", "--out", str(path), *options, code=1)
        held = len(read_forest(path))
        assert 0 < held < 6 and f"{held} of 6 questions are in {path}; the same command continues" in output
        assert "error: the engine failed" in output and "HTTP 500" in output and "Traceback" not in output
        server.fault = lambda number: None
        run(tiny, "--questions", "6", "--out", str(path), *options)
    assert list(tokens(path)) == list(tokens(whole))[:6]
    same = [name for name, tree in tokens(path).items() if tree == tokens(whole)[name]]
    assert len(same) >= 5  # float32: a batch's size can flip a sample


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "trees.csv"], "must end in .jsonl or .parquet"),
        (["--questions", "none"], "must be a number of questions or all"),
        (["--split", "dev"], "invalid choice"),
        (["--split", "test"], "the split test is now called eval"),
        (["engine.name=server"], "needs engine.urls"),
    ],
)
def test_bad_input(tiny: dict[str, Any], arguments: list[str], words: str) -> None:
    # Fails if it is found out only after the processes have started.
    assert words in run(tiny, *arguments, code=2)
