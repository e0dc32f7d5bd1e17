"""Metrics, phase times, progress: what a run writes about itself."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pty
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch

from atpo_fast.common.jsonl import append_records, read_records
from atpo_fast.common.log import set_up_logging
from atpo_fast.config import Config, LoggingConfig
from atpo_fast.telemetry import PhaseTimer, Progress, RunLogger, read_metrics


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A full disk: the kernel cuts the write that crosses `size`, then refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_record_holds_phase_step_time_and_plain_numbers(tmp_path: Path) -> None:
    # fails if tensors or NumPy numbers reach JSON as text, or if a non-finite number makes the line illegal JSON
    logger = RunLogger(tmp_path / "new" / "run", Config())
    metrics = {
        "reward/mean": torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True),
        "reward/em": np.float32(0.25),
        "policy/skipped_steps": 3,
        "policy/grad_norm": float("nan"),
        "policy/ratio_max": torch.tensor(math.inf),
    }
    logger.log("train", 7, metrics)
    logger.close()
    path = tmp_path / "new" / "run" / "metrics.jsonl"
    line = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["phase"] == "train" and line["step"] == 7 and line["time"] > 1e9
    assert line["reward/mean"] == 0.5 and line["reward/em"] == 0.25 and line["policy/skipped_steps"] == 3
    record = read_metrics(path)[0]
    assert math.isnan(record["policy/grad_norm"]) and record["policy/ratio_max"] == math.inf


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    # fails if lines wait in a buffer: a killed run would lose them
    logger = RunLogger(tmp_path, Config())
    for step in range(3):
        logger.log("cold_start", step, {"cold_start/loss": 1.0})
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step + 1


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    # fails if every rank appended its own copy of a record
    logger = RunLogger(tmp_path / "run", Config(), is_main=False)
    logger.log("train", 1, {"reward/mean": 1.0})
    logger.truncate_after(0)
    logger.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "tail", ['{"phase": "train", "st', '{"a": "\u00e9'.encode()[:-1].decode("latin-1"), "\x00\x00"]
)
def test_half_written_last_line_is_skipped_and_then_cut(tmp_path: Path, tail: str) -> None:
    # tails: a cut record, one cut inside a UTF-8 character, the NULs a crash of the machine leaves.
    # Fails if the reader raises on them, or if the next record is glued to them and lost with them.
    path = tmp_path / "metrics.jsonl"
    append_records(path, [{"step": 1}, {"step": 2}])
    with path.open("ab") as file:
        file.write(tail.encode("latin-1"))
    assert [r["step"] for r in read_records(path)] == [1, 2]
    append_records(path, [{"step": 3}])
    assert [r["step"] for r in read_records(path)] == [1, 2, 3]


def test_whole_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    # fails if a record that only lacks its newline is thrown away
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    append_records(path, [{"step": 3}])
    assert [r["step"] for r in read_records(path)] == [1, 2, 3]


def test_malformed_line_inside_a_file_is_named(tmp_path: Path) -> None:
    # fails if damage in the middle of a file passes silently
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3"):
        read_records(path)


def test_truncation_drops_later_steps_of_the_resumed_phases(tmp_path: Path) -> None:
    # fails if a resumed step appears twice, or if cold start records (their own steps) are dropped with it
    logger = RunLogger(tmp_path, Config())
    logger.truncate_after(0)  # nothing written yet: no file, no error
    logger.log("cold_start", 300, {})
    for step in range(1, 6):
        logger.log("train", step, {})
        logger.log("eval", step, {})
        append_records(tmp_path / "trees.jsonl", [{"step": step, "turns": []}])
    logger.truncate_after(3)
    kept = [(r["phase"], r["step"]) for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert kept == [("cold_start", 300)] + [(phase, step) for step in (1, 2, 3) for phase in ("train", "eval")]
    assert [r["step"] for r in read_records(tmp_path / "trees.jsonl")] == [1, 2, 3]
    logger.truncate_after(-1, ("cold_start", "train", "eval"))
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_what_a_full_disk_does_not_take_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # fails if a full disk raises into the training loop, floods stderr, leaves half a record before later ones, or if
    # what it did not take is lost, doubled or written out of order; or if the next full disk is not told
    set_up_logging()
    logger, path = RunLogger(tmp_path, Config()), tmp_path / "metrics.jsonl"
    logger.log("train", 1, {"reward/mean": 0.5})
    size = path.stat().st_size
    with files_no_larger_than(size + 20):
        for step in (2, 3):
            logger.log("train", step, {"reward/mean": 0.5})
            logger.log_trees([{"step": step, "turns": ["long"] * 100}])
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            logger.settle()
    assert path.stat().st_size == size
    assert capsys.readouterr().err.count("warning: logging to metrics.jsonl") == 1
    logger.log("train", 4, {"reward/mean": 0.5})
    logger.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]
    assert [r["step"] for r in read_records(tmp_path / "trees.jsonl")] == [2, 3]
    again = RunLogger(tmp_path, Config())
    again.log("train", 5, {})
    for _ in range(2):
        with files_no_larger_than(size):
            again.log("train", 6, {})
        again.log("train", 7, {})
    assert capsys.readouterr().err.count("warning: logging to metrics.jsonl") == 2


def test_resuming_on_a_full_disk_stops(tmp_path: Path) -> None:
    # fails if later steps stay in the file, which would be logged a second time
    logger = RunLogger(tmp_path, Config())
    for step in (1, 2):
        logger.log("train", step, {"reward/mean": 0.5})
    with files_no_larger_than(20), pytest.raises(OSError, match=r"metrics\.jsonl"):
        logger.truncate_after(1)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_tensorboard_events_hold_the_scalars(tmp_path: Path) -> None:
    # fails if phases share one event stream: step 1 of the cold start and of train would overwrite each other
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = RunLogger(tmp_path, Config(logging=LoggingConfig(tensorboard=True)))
    logger.log("cold_start", 1, {"cold_start/loss": 2.0})
    logger.log("train", 1, {"reward/mean": torch.tensor(0.5), "note": "text is left out"})
    logger.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard" / "train"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.5)]


@pytest.mark.parametrize(
    ("module", "config"),
    [
        ("torch.utils.tensorboard", LoggingConfig(tensorboard=True)),
        ("wandb", LoggingConfig(wandb_project="p")),
    ],
)
def test_missing_tracker_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, config: LoggingConfig
) -> None:
    # fails if a missing tracker is found out only after the cold start, or without the command that helps
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail as for a package that is not installed
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'atpo_fast\[trackers\]'"):
        RunLogger(tmp_path, Config(logging=config))


def test_nested_phases_are_recorded_under_the_outer_one() -> None:
    # fails if the rollouts of an evaluation count as training's, or if a given full name gets its prefix twice
    timer = PhaseTimer()
    with timer.phase("rollout"), timer.phase("rollout/tools"):
        pass
    with timer.phase("update"):
        with timer.phase("loss"):
            pass
        with timer.phase("loss"):
            pass
    with timer.phase("eval"), timer.phase("rollout"), timer.phase("rollout/generate"):
        pass
    seconds = timer.pop()
    assert set(seconds) == {
        "rollout", "rollout/tools", "update", "update/loss", "eval", "eval/rollout", "eval/rollout/generate"
    }  # fmt: skip
    assert 0 <= seconds["update/loss"] <= seconds["update"]
    assert timer.pop() == {}


def test_phase_that_raises_is_still_closed() -> None:
    # fails if an exception leaves the phase open: everything later would be recorded inside it
    timer = PhaseTimer()
    with pytest.raises(RuntimeError), timer.phase("rollout"):
        raise RuntimeError
    with timer.phase("update"):
        pass
    assert set(timer.pop()) == {"rollout", "update"}


def _use(progress: Progress) -> None:
    with progress:
        progress.start_phase("rollout", 4)
        progress.advance(2, decoded_tokens=100, loss=0.5)
        progress.advance(4)
        progress.start_phase("update")
        progress.step_done(1, 10, {"reward/mean": torch.tensor(0.5), "policy/clipped_low": 0.1}, "train")
        progress.message("a [message] with brackets")


def test_plain_progress_writes_one_line_per_step() -> None:
    # fails if plain logs get control characters, if a step takes several lines, or if [..] is taken for markup
    out = io.StringIO()
    _use(Progress("auto", file=out))
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 and "\x1b" not in out.getvalue()
    assert lines[0].startswith("train 1/10  reward 0.500  clip- 10.00%")
    assert lines[1] == "a [message] with brackets"


def _terminal_output(use: Callable[[IO[str]], None]) -> str:
    """What `use` writes to a pseudo-terminal, which is read meanwhile as a real one is."""
    master, slave = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other side is closed
            while chunk := os.read(master, 4096):
                chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as file:
        use(file)
    reader.join()
    os.close(master)
    return b"".join(chunks).decode()


@pytest.mark.parametrize("term", ["xterm-256color", "vt100", "dumb"])
def test_auto_progress_on_a_real_terminal(monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    # one terminal with colours, one without, one that cannot redraw; fails if the display breaks on any of them,
    # draws on the last, or leaves the cursor hidden
    monkeypatch.setenv("TERM", term)
    written = _terminal_output(lambda file: _use(Progress("auto", file=file)))
    assert "reward 0.500" in written and "a [message] with brackets" in written
    assert ("\x1b[2K" in written) == (term != "dumb")
    assert written.rfind("\x1b[?25h") >= written.rfind("\x1b[?25l")


@pytest.mark.parametrize("mode", ["live", "plain", "off"])
def test_progress_never_swallows_an_exception(mode: str) -> None:
    # fails if __exit__ answers true
    with pytest.raises(KeyError), Progress(mode, file=io.StringIO()):  # type: ignore[arg-type]
        raise KeyError


@pytest.mark.parametrize("mode", ["live", "plain"])
def test_output_that_cannot_be_written_ends_the_display_only(mode: str) -> None:
    # a closed pipe, as under `| head`, and a closed file; fails if either kills the run
    reading, writing = os.pipe()
    os.close(reading)
    broken = os.fdopen(writing, "w", buffering=1)
    closed = io.StringIO()
    closed.close()
    for file in (broken, closed):
        _use(Progress(mode, file=file))  # type: ignore[arg-type]
    with contextlib.suppress(BrokenPipeError):  # what its buffer still holds
        broken.close()


def test_other_ranks_show_nothing() -> None:
    # fails if every rank printed every step
    out = io.StringIO()
    _use(Progress("plain", is_main=False, file=out))
    assert out.getvalue() == ""
