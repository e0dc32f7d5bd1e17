"""Every method on real questions, by its name alone: two steps with a tiny random model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from atpo_fast.config.methods import METHODS
from tests.helpers.runs import TINY, records, run

QUESTIONS = "train/hotpot_train_bolaa_easy100.jsonl"
CONFIG = TINY | {
    "data": {
        "source": "files",
        "train_files": [f"{QUESTIONS}[:12]"],
        "eval_files": [f"{QUESTIONS}[12:14]"],
        "corpus_files": [QUESTIONS],
        "max_prompt_tokens": 600,
    },
    "tools": {"top_k": 1, "passage_chars": 200, "max_result_tokens": 64},
    "model": TINY["model"] | {"vocab_size": 600, "max_positions": 1024},
    "cold_start": {"from_evidence": True, "steps": 2, "batch_size": 2},
    "train": {"steps": 2, "questions_per_step": 2, "questions_per_minibatch": 1, "row_tokens": 1024, "save_every": 0},
    "rollout": {"max_turn_tokens": 8, "max_response_tokens": 160},
    "credit": {},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen two steps of demonstrations, which all methods start from."""
    if not (Path(os.environ.get("ATPO_DATA", "")) / QUESTIONS).is_file():
        pytest.skip("ATPO_DATA names no folder with the questions")
    folder = tmp_path_factory.mktemp("start")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG | {"run_dir": str(folder / "run")}))
    run(config, "train.steps=1")
    return folder / "run" / "cold_start"


# Fails for a method that the short prompts and quick answers of the world suit, and real ones do not: a prompt of
# hundreds of tokens, results cut in the middle, questions of which none is answered.
@pytest.mark.data
@pytest.mark.parametrize("method", [name for name in METHODS if name != "react"])
def test_a_method_by_its_name(tmp_path: Path, start: Path, method: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG | {"run_dir": str(tmp_path / "run"), "method": method}))
    options = [f"model.path={start}", "cold_start.when=never", "train.dynamic_sampling.on_exhausted=continue"]
    output = run(config, *options)
    steps = records(tmp_path / "run", "train")
    assert sorted(steps) == [1, 2], output[-1000:]
    for step in steps.values():
        assert step["tokens/unique"] > 0
        if method != "aepo":  # its monitoring throws a probe and a chain away
            assert step["tokens/prefilled"] + step["tokens/shared"] == step["tokens/unique"]


# Fails for a ReAct that cannot be evaluated, as it has nothing to train.
@pytest.mark.data
def test_react_is_evaluated(tmp_path: Path, start: Path) -> None:
    from tests.helpers.forked_runs import finish, start_command

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG | {"run_dir": str(tmp_path / "run"), "method": "react"}))
    finish(start_command("eval", "--config", str(config), f"model.path={start}"))
