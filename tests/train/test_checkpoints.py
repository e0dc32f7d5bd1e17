"""Checkpoints: what belongs to them, and which are kept. Damaged ones: tests/integration."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from atpo_fast.common.manifest import MANIFEST, damage, write_manifest
from atpo_fast.train.checkpoints import _write, kept


# The main rank writes each shard of a model into a folder of its own, which is gone once they are joined. Fails when
# another rank, which is done before, looks into it: its checkpoint ended the run now and then.
def test_a_rank_looks_at_its_own_files_alone(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "state").mkdir()
    ended = threading.Event()

    def join_shards() -> None:
        while not ended.is_set():
            for number in range(20):
                (tmp_path / f"hf/.part_{number}").mkdir()
            for number in range(20):
                (tmp_path / f"hf/.part_{number}").rmdir()

    def write(folder: Path) -> None:
        for name in ("rank_00001_000.safetensors", "random_00001.safetensors", "rank_00010_000.safetensors"):
            (folder / "state" / name).touch()

    thread = threading.Thread(target=join_shards)
    thread.start()
    try:
        for _ in range(300):
            found = _write(tmp_path, [write], 1)
            assert found.keys() == {"state/rank_00001_000.safetensors", "state/random_00001.safetensors"}
    finally:
        ended.set()
        thread.join()


# Fails when a manifest may lead out of its folder: a run would then open whatever another one has planted.
def test_a_manifest_stays_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "outside").touch()
    (tmp_path / "inside").mkdir()
    write_manifest(tmp_path / "inside")
    listed = json.loads((tmp_path / "inside" / MANIFEST).read_text())
    listed["files"]["../outside"] = {"bytes": 0, "sha256": ""}
    (tmp_path / "inside" / MANIFEST).write_text(json.dumps(listed))
    assert "outside of the folder" in str(damage(tmp_path / "inside"))


# Fails when the best checkpoint is deleted with the old ones, or one without an evaluation counts as the best.
def test_which_checkpoints_are_kept(tmp_path: Path) -> None:
    scores = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.9, 5: 0.2, 6: 0.3}
    for step, em in scores.items():
        folder = tmp_path / f"checkpoints/step_{step:06d}"
        folder.mkdir(parents=True)
        # that of step 3 is older, and would be the best
        state = {"step": step, "eval_em": 1.0 if step == 3 else em, "eval_step": 2 if step == 3 else step}
        (folder / "state.json").write_text(json.dumps(state))

    def steps(newest: int, best: int) -> list[int]:
        return sorted(int(folder.name[5:]) for folder in kept(tmp_path, newest, best))

    assert steps(2, 0) == [5, 6]
    assert steps(2, 1) == [4, 5, 6]  # of equal ones the newer
    assert steps(1, 3) == [2, 4, 6]
