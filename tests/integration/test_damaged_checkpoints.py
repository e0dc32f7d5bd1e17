"""Damaged checkpoints: each damage is named, and a whole run falls back to the checkpoint before."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atpo_fast.common.manifest import MANIFEST, damage
from tests.helpers.runs import records, run, write_config

EXACT = "rollout.schedule=synchronous"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps, with the checkpoints of the last two."""
    folder = tmp_path_factory.mktemp("whole")
    run(write_config(folder), EXACT, "train.async_save=true")
    return folder / "run"


class Planted:
    """What writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.path,))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "flipped": ("state/rank_00000_000.safetensors", flip),
    "truncated": ("hf/model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100])),
    "missing": ("state/rank_00000_000.safetensors", Path.unlink),
    "empty": ("state.json", lambda path: path.write_bytes(b"")),
    "no_json": (MANIFEST, lambda path: path.write_text(path.read_text()[:-20])),
    "other_json": (MANIFEST, lambda path: path.write_text('{"files": [1]}')),
    "unmarked": (MANIFEST, Path.unlink),
}


# Fails when a file is used although it is not the one that was written, or the reason names another file.
@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_is_named(whole: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "step_000003"
    shutil.copytree(whole / "checkpoints/step_000003", folder)
    assert damage(folder) is None
    name, harm = DAMAGES[kind]
    harm(folder / name)
    assert name in str(damage(folder))


# A flipped checkpoint was trained on in silence (EM fell from 1 to 0), and a planted pickle was executed. Fails when
# either happens, when the run does not go back to the checkpoint before, or does not repeat its steps to the digit, or
# when it needs the cold start, which is damaged too, for that.
def test_a_run_falls_back_to_the_checkpoint_before(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step_000003"
    flip(newest / "state/rank_00000_000.safetensors")
    before = tmp_path / "run/checkpoints/step_000002"
    for name in ("deepspeed/state/mp_rank_00_model_states.pt", "state/more.pt"):
        (before / name).parent.mkdir(parents=True, exist_ok=True)
        (before / name).write_bytes(pickle.dumps(Planted(tmp_path / "executed")))
    flip(tmp_path / "run/cold_start/model.safetensors")
    (tmp_path / "run/summary.json").unlink()
    output = run(write_config(tmp_path), EXACT)
    assert "CHECKPOINT DAMAGED" in output and "rank_00000_000.safetensors has changed" in output
    assert "resumed from" in output and "step_000002" in output
    assert not (tmp_path / "executed").exists()
    assert damage(newest) is None
    assert_same(records(tmp_path / "run", "train")[3], records(whole, "train")[3])


# Fails when a run that was killed between its cold start and its first checkpoint goes on with other random numbers
# than one that was not. Nothing draws from them yet.
def test_random_numbers_of_a_run_whose_cold_start_was_made_before(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "cold_start", tmp_path / "run/cold_start")
    shutil.copy(whole / "cold_start.run.json", tmp_path / "run")
    run(write_config(tmp_path), EXACT)
    random = "checkpoints/step_000003/state/random_00000.safetensors"
    assert (tmp_path / "run" / random).read_bytes() == (whole / random).read_bytes()


# Fails when RL begins with a cold start that is cut or flipped, or the one that is made again is another.
def test_a_damaged_cold_start_is_made_again(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "cold_start", tmp_path / "run/cold_start")
    flip(tmp_path / "run/cold_start/model.safetensors")
    output = run(write_config(tmp_path), EXACT, "train.steps=1")
    assert "COLD START DAMAGED" in output and "model.safetensors has changed" in output
    assert_same(records(tmp_path / "run", "train")[1], records(whole, "train")[1])


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """All values but times are equal to the digit."""
    for name, value in expected.items():
        if not name.startswith(("time", "rate/")):
            assert found[name] == value, name


# Fails when a run begins again, and overwrites what is left of itself, because every checkpoint is damaged.
def test_without_an_intact_checkpoint_nothing_is_overwritten(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for folder in (tmp_path / "run/checkpoints").iterdir():
        (folder / "state.json").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    output = run(write_config(tmp_path), EXACT, "train.steps=4", code=2)
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "no checkpoint in" in line and "state.json is missing" in line and "train.resume=never" in line
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
