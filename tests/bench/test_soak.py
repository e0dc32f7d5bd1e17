"""The soak: when faults strike, what counts as growth, what is compared."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bench.soak.faults import KINDS, flip, schedule
from bench.soak.kills import PHASES, compare, moments
from bench.soak.watch import Sample, growth


def test_faults_strike_as_often_as_asked_after_different_steps() -> None:
    """Fails if two faults hide each other, one strikes before there are two checkpoints, or a seed does not repeat."""
    found = schedule(list(KINDS), 4, 500, 21, random.Random(3))
    assert found == schedule(list(KINDS), 4, 500, 21, random.Random(3))
    assert [fault.step for fault in found] == sorted({fault.step for fault in found})
    assert {kind: sum(fault.kind == kind for fault in found) for kind in KINDS} == dict.fromkeys(KINDS, 4)
    assert found[0].step >= 21 and found[-1].step < 479


def test_kills_come_in_the_order_of_the_run() -> None:
    """Fails if a kill waits for a phase that is over."""
    found = moments(10, 12, random.Random(0))
    assert [moment.phase for moment in found][:2] == ["cold start", "cold start"]
    assert sorted(moment.phase for moment in found) == sorted(PHASES)
    steps = [moment.steps for moment in found]
    assert steps == sorted(steps) and steps[-1] < 11


def test_growth_is_the_rise_of_the_line_after_warming_up() -> None:
    """Fails if what a process needs to start counts as growth, or if a leak of a handle every ten steps does not."""
    samples = [
        Sample("rank 0", life, age, step, 300.0 if age > 10 else 30.0 * age, 9 + step % 2 * life, 20 + step // 10)
        for life in range(2)
        for age in range(1, 251)
        for step in [250 * life + age]
    ]
    memory, threads, handles = (growth(samples, name, 10)["rank 0"] for name in ("memory_mb", "threads", "handles"))
    assert memory["mean"] == 300 and memory["rise"] == pytest.approx(0, abs=1e-9)
    assert threads["rise"] == pytest.approx(0, abs=1e-9)  # some of them are in use at every other step of a life
    assert handles["rise"] == pytest.approx(50, abs=1)


def run_folder(folder: Path, em: float = 0.5, weights: bytes = b"w", seconds: float = 1.0) -> Path:
    (folder / "checkpoints/step_000001/hf").mkdir(parents=True)
    (folder / "checkpoints/step_000001/hf/model.safetensors").write_bytes(weights)
    record = f'{{"phase": "train", "step": 1, "reward/em": {em}, "policy/loss": "nan", "time/total": {seconds}}}'
    (folder / "metrics.jsonl").write_text(record + "\n")
    return folder


def test_what_is_compared_after_kills(tmp_path: Path) -> None:
    """Fails if times count, if a missing or doubled record does not, or if the last digit or bit does not."""
    one = run_folder(tmp_path / "one")
    assert compare(one, run_folder(tmp_path / "same", seconds=2.0)) == ({"values": 2, "files": 1}, [])
    assert compare(one, run_folder(tmp_path / "em", em=0.5000000001))[1] == ["('train', 1, 0, 'reward/em')"]
    assert compare(one, run_folder(tmp_path / "weights", weights=b"v"))[1]
    twice = run_folder(tmp_path / "twice")
    (twice / "metrics.jsonl").write_text((one / "metrics.jsonl").read_text() * 2)
    assert len(compare(one, twice)[1]) == 2
    nothing = run_folder(tmp_path / "nothing")
    (nothing / "metrics.jsonl").write_text("")
    assert len(compare(one, nothing)[1]) == 2


def test_flipped_bytes(tmp_path: Path) -> None:
    """Fails if corrupting a file changes nothing, or its length."""
    (tmp_path / "file").write_bytes(bytes(100))
    flip(tmp_path / "file", 90)
    assert (tmp_path / "file").read_bytes() == bytes(90) + b"\xff" * 10
