"""The report: one file, complete, safe, and honest about what is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atpo_fast.config import Config, save_config
from atpo_fast.report import build_report
from atpo_fast.report.build import embeddable_json
from atpo_fast.telemetry import RunLogger
from atpo_fast.tree.storage import tree_record
from atpo_fast.tree.turn_tree import TurnTree

NASTY = "<search>x</search></script><script>alert(1)</script><!-- & \u2028 {{data}} {{style}}"


class Page(HTMLParser):
    """What a browser's parser sees: the tags with their attributes, and the text of each <script>."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data


class OneText:
    """A tokenizer that decodes everything to one text."""

    def decode(self, token_ids: list[int]) -> str:
        return NASTY if token_ids else ""


def make_tree(name: str) -> TurnTree:
    tree = TurnTree([1], question_id=name, meta={"question": NASTY})
    turn = tree.add_turn(0, [1], [-0.5], [1], tool="search")
    tree.set_reward(tree.add_turn(turn, [1], [-0.25]), 1.0)
    tree.values = tree.advantages = np.array([0.0, 0.5, -0.5])
    return tree


def write_run(folder: Path) -> None:
    """A complete run of ten steps."""
    logger = RunLogger(folder, Config())
    logger.log("cold_start", 1, {"cold_start/loss": 2.5})
    logger.log("eval", 0, {"eval/em": 0.25, "eval/questions": 200})
    for step in range(1, 11):
        times = {"time/rollout": 3.0, "time/rollout/generate": 2.0, "time/eval": 1.0, "time/eval/rollout": 0.5}
        metrics = {"reward/mean": step / 10, "policy/grad_norm": float("nan") if step == 5 else 1.0, "own/metric": 1.0}
        logger.log("train", step, metrics | times)
        logger.log_trees([tree_record(make_tree(f"q{step}-{i}"), step, OneText()) for i in range(5)])
    logger.log("eval", 10, {"eval/em": 0.75, "eval/questions": 200})
    save_config(Config(run_dir=str(folder)), folder / "config.yaml")
    summary = {"cold_start_em": 0.25, "final_em": 0.75, "train_seconds": 3725, "overlap": 0.4}
    (folder / "summary.json").write_text(json.dumps(summary))


def data_of(page: Path) -> dict[str, Any]:
    parsed = Page(page.read_text(encoding="utf-8"))
    kinds = [attributes.get("type") for tag, attributes in parsed.tags if tag == "script"]
    return json.loads(parsed.scripts[kinds.index("application/json")])


def chart_of(data: dict[str, Any], title: str) -> dict[str, list[list[float | None]]]:
    return next({s["name"]: s["points"] for s in c["series"]} for c in data["charts"] if c["title"] == title)


def test_complete_run(tmp_path: Path) -> None:
    # fails if a metric is drawn at the wrong step, a non-finite value breaks the data, or nested times count twice
    write_run(tmp_path)
    page = build_report(tmp_path)
    assert page == tmp_path / "report.html"
    data = data_of(page)
    assert data["missing"] == []
    assert data["headline"] == {"cold_start_em": 0.25, "final_em": 0.75, "finished": True, "questions": 200}
    assert ["Wall time", "1 h 02 min"] in data["facts"]
    assert chart_of(data, "Reward of sampled trajectories")["reward"] == [[s, s / 10] for s in range(1, 11)]
    assert chart_of(data, "Evaluation, greedy")["exact match"] == [[0, 0.25], [10, 0.75]]
    assert chart_of(data, "Gradient norm")["gradient norm"][4] == [5, None]
    assert chart_of(data, "Cold start loss")["loss"] == [[1, 2.5]]
    times = {name: points[0][1] for name, points in chart_of(data, "Time per step").items()}
    assert times == {"rollout, rest": 1.0, "rollout/generate": 2.0, "eval": 1.0}
    assert chart_of(data, "own/metric")["own/metric"][0] == [1, 1.0]
    assert [tree["question_id"] for tree in data["trees"]] == ["q1-0", "q1-1", "q1-2", "q10-0", "q10-1", "q10-2"]


def test_rollout_text_cannot_leave_the_data(tmp_path: Path) -> None:
    # fails if </script> in a passage ends the data, or if text equal to a template mark is replaced
    write_run(tmp_path)
    page = build_report(tmp_path)
    assert data_of(page)["trees"][0]["turns"][1]["text"] == NASTY
    parsed = Page(page.read_text(encoding="utf-8"))
    assert len(parsed.scripts) == 3 and "alert(1)" not in "".join(parsed.scripts[1:])
    assert not re.search(r"[<>&\u2028]", embeddable_json({"text": NASTY}))


def test_run_name_is_escaped(tmp_path: Path) -> None:
    # fails if a folder name is taken for HTML
    folder = tmp_path / "<img src=x>"
    write_run(folder)
    assert "img" not in [tag for tag, _ in Page(build_report(folder).read_text()).tags]


def test_page_loads_nothing(tmp_path: Path) -> None:
    # fails if a script, style sheet, font or picture is fetched from anywhere
    write_run(tmp_path)
    text = build_report(tmp_path).read_text()
    parsed = Page(text)
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base"), tag
        assert not {"src", "srcset", "data", "action"} & attributes.keys(), tag
        assert (attributes.get("href") or "#").startswith("#"), attributes
    policies = [a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies and "default-src 'none'" in str(policies[0])
    outside_data = text.replace(parsed.scripts[0], "")  # the data may quote addresses, e.g. tools.search_url
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(", outside_data)
    assert "{{" not in outside_data


def test_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    # fails if a report of a running or killed job cannot be made, or is silent about its gaps
    RunLogger(tmp_path, Config()).log("train", 1, {"reward/mean": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "tr')
    data = data_of(build_report(tmp_path))
    told = " ".join(data["missing"])
    for gap in ("cold start", "evaluation", "summary.json", "config.yaml", "trees.jsonl"):
        assert gap in told
    assert data["headline"]["final_em"] is None and data["trees"] == []
    assert chart_of(data, "Reward of sampled trajectories") == {"reward": [[1, 0.5]]}


def test_damaged_side_files_are_told_not_fatal(tmp_path: Path) -> None:
    # fails if a half-written summary or a broken config.yaml makes the report impossible
    write_run(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    (tmp_path / "config.yaml").write_text("a: [")
    data = data_of(build_report(tmp_path))
    assert len(data["missing"]) == 2 and data["config"] == "a: ["
    assert data["headline"]["final_em"] == 0.75  # from the evaluations then


def test_empty_metrics_still_give_a_page(tmp_path: Path) -> None:
    # fails if a run that was killed before its first record has no report
    (tmp_path / "metrics.jsonl").touch()
    data = data_of(build_report(tmp_path))
    assert "metrics.jsonl has no records yet" in data["missing"] and data["charts"] == []


def test_no_run_is_a_clear_error(tmp_path: Path) -> None:
    # fails if a mistyped folder gives an empty report or a traceback from deep inside
    with pytest.raises(FileNotFoundError, match="no run folder"):
        build_report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        build_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_repeated_step_counts_once(tmp_path: Path) -> None:
    # fails if a step that was done again after a kill is drawn twice: the later record holds
    logger = RunLogger(tmp_path, Config())
    for reward in (0.1, 0.9):
        logger.log("train", 1, {"reward/mean": reward})
    points = chart_of(data_of(build_report(tmp_path)), "Reward of sampled trajectories")["reward"]
    assert points == [[1, 0.9]]


def test_one_evaluation_is_not_a_change(tmp_path: Path) -> None:
    # fails if the headline of a run that was evaluated only once claims a result of RL
    RunLogger(tmp_path, Config()).log("eval", 0, {"eval/em": 0.25})
    headline = data_of(build_report(tmp_path))["headline"]
    assert (headline["cold_start_em"], headline["final_em"], headline["finished"]) == (0.25, None, False)
