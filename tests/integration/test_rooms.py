"""A whole run in the world of rooms."""

from __future__ import annotations

from pathlib import Path

from atpo_fast.tree.storage import read_trees
from tests.helpers.runs import records, run, write_config

# Rooms that note in a file what is opened, and closed by a thread of the loop.
NOTING = """
import asyncio
import copy
from pathlib import Path

from atpo_fast.world.rooms import RoomsSession

NOTES = Path(__file__).with_name("notes.txt")


def note(word):
    with NOTES.open("a") as file:
        file.write(word + " ")


class Noting(RoomsSession):
    def fork(self):
        note("opened")
        return copy.copy(self)

    async def close(self):
        await asyncio.sleep(2)  # the last sessions are still closing when the command ends
        await asyncio.to_thread(note, "closed")


def open_session(task, seed):
    note("opened")
    return Noting(task, seed)
"""
ROOMS = (
    "data.source=rooms",
    "rooms.train_questions=12",
    "rooms.eval_questions=3",
    "rooms.demonstrations=64",
    "rooms.door_reward=0.5",
    "tools.builtin=[]",
    "cold_start.steps=2",
    "train.steps=1",
    "task.rewards=[session]",
)


def test_a_run_in_the_rooms(tmp_path: Path) -> None:
    """Fails if sessions do not reach the trainer, or their numbers the metrics and the report, or if any stays open."""
    (tmp_path / "noting.py").write_text(NOTING)
    run(write_config(tmp_path), *ROOMS, f"environment.factory={tmp_path}/noting.py:open_session")
    notes = (tmp_path / "notes.txt").read_text().split()
    assert notes.count("opened") == notes.count("closed") > 10
    metrics = records(tmp_path / "run", "train")[1]
    assert metrics["session/opened"] > 0 and metrics["session/live"] > 0 and metrics["session/hung"] == 0
    assert {"session/forks_copy", "session/mismatches", "reward/session", "time/rollout/open"} <= metrics.keys()
    assert "session/forks_copy" in (tmp_path / "run" / "report.html").read_text()
    tree = read_trees(tmp_path / "run" / "trees.jsonl")[0]
    assert "Keys: " in tree["turns"][0]["observation"] and "step_reward" in tree["turns"][1]
