"""A small training under the faults of the soak, and one under kills (docs/long_runs.md)."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

from bench.soak.faults import Fault, Injector
from bench.soak.kills import kill_and_compare, moments
from bench.soak.supervisor import Supervisor
from tests.helpers.forked_runs import ForkedProcess, start_command
from tests.helpers.runs import records, write_config


def start_forked(words: Sequence[str], output: Path) -> ForkedProcess:
    return start_command(*words, output=output)


def test_a_small_training_under_faults(tmp_path: Path) -> None:
    """Fails if a fault does not strike, the loop does not start the training again, or a step is lost or doubled."""
    options = ["ranks=2", "train.steps=16", "train.save_every=2", "train.async_save=true", "data.max_eval_questions=1"]
    words = ["train", "--config", str(write_config(tmp_path)), *options]
    faults = [Fault(5, "rank killed"), Fault(9, "checkpoint corrupt")]
    injector = Injector(None, tmp_path, random.Random(0), delay=0.0)
    told: list[str] = []
    output = tmp_path / "output"
    lived = Supervisor(words, tmp_path / "run", output, faults, injector, told.append, start_forked).run()
    assert [end["code"] for end in lived.ends] == [137, -9, 0]
    assert [fault["kind"] for fault in lived.faults] == ["rank killed", "checkpoint corrupt"] and not lived.left_over
    assert sorted(records(tmp_path / "run", "train")) == list(range(1, 17))
    assert "CHECKPOINT DAMAGED" in output.read_text()
    assert {sample.process for sample in lived.samples} == {"rank 0", "rank 1"}
    assert all(sample.memory_mb > 10 and sample.threads and sample.handles for sample in lived.samples)


KILLS = int(os.environ.get("ATPO_TEST_KILLS", "2"))
"""Kills of the test below; ten take a minute of CPU time."""


def test_killed_and_unbroken_trainings_are_equal(tmp_path: Path) -> None:
    """Fails if anything that a later step needs is in no checkpoint: any logged value or weight would be another."""
    options = ["ranks=2", "train.steps=8", "train.save_every=2", "train.eval_every=4"]
    options += ["cold_start.steps=12", "cold_start.save_every=5"]
    options += ["rollout.schedule=synchronous", "logging.progress=live", "data.max_eval_questions=2"]
    words = ["train", "--config", str(write_config(tmp_path)), *options]
    told: list[str] = []
    found = kill_and_compare(words, tmp_path, moments(KILLS, 8, random.Random(1)), start_forked, told.append)
    print("\n".join(told), found["compared"])
    assert found["differing"] == [] and found["compared"]["values"] > 400 and found["compared"]["files"] > 10
    assert len(found["kills"]) == KILLS
