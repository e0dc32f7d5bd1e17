"""Many trees over sessions that fail in every way: each question gets its tree, and nothing is left.

`ATPO_TEST_TREES` sets the number of trees.
"""

from __future__ import annotations

import os
import subprocess
import threading
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from atpo_fast.engines.base import Request
from atpo_fast.environment import Result, Session, SessionLostError
from tests.environment.test_sessions import wait_until
from tests.helpers.scripted_engine import ScriptedEngine
from tests.helpers.sessions import TOKENIZER, make_search, make_sessions, questions, roll_out

FAULTS = ("none", "fork", "hang", "score", "long", "restless", "open", "close", "lost", "raise", "opening")
numbers = iter(range(10**9))


def fault_of(name: str) -> str:
    """Every third question is sound; the others have a fault each. Few hang, since each waits for its time limit."""
    number = zlib.crc32(name.encode())
    fault = FAULTS[number % len(FAULTS)] if number % 3 and name != "check" else "none"
    return "lost" if fault == "hang" and number % 4 else fault


class Faulty(Session):
    """Holds a file, and now and then a process; fails in the way of its question."""

    live: set[Faulty] = set()  # noqa: RUF012 (the test looks for what is left)

    def __init__(self, task: dict[str, Any], seed: int, done: list[str] | None = None) -> None:
        self.task, self.seed, self.done, self.fault = task, seed, done or [], fault_of(task["id"])
        if self.fault == "open":
            raise OSError("no container")
        self.opening = f"question {next(numbers) if self.fault == 'opening' else ''}"
        self.file = Path(os.devnull).open()  # noqa: SIM115 (closed by `close`)
        self.child = subprocess.Popen(["sleep", "3600"]) if zlib.crc32(task["id"].encode()) % 50 == 1 else None
        Faulty.live.add(self)

    def step(self, text: str) -> Result:
        acted = len(self.done)
        self.done.append(text)
        if acted == 1:
            while self.fault == "hang" and not self.file.closed:
                threading.Event().wait(0.01)
            if self.fault == "raise":
                raise RuntimeError("no such door")
            if self.fault == "lost":
                raise SessionLostError("the container died")
        long = "x" * 10_000_000 if self.fault == "long" else ""
        return Result(f"Did {' , '.join(self.done)} {next(numbers) if self.fault == 'restless' else ''} {long}", 1.0)

    def fork(self) -> Faulty:
        if self.fault == "fork":
            raise MemoryError("no room for a snapshot")
        return Faulty(self.task, self.seed, list(self.done))

    def score(self, transcript: list[dict[str, str]]) -> float:
        if self.fault == "score":
            raise ZeroDivisionError("no judge")
        return float(len(self.done))

    def close(self) -> None:
        self.file.close()
        if self.child is not None:
            self.child.kill()
            self.child.wait()
        Faulty.live.discard(self)
        if self.fault == "close":
            raise BrokenPipeError("was closed already")


def script(prompt: str, request: Request) -> str:
    """Acts (3 of 4) or answers, by the seed."""
    rng = np.random.default_rng(request.seed)
    word = rng.choice(["one", "two", "three"])
    return f"<act> {word}</act>" if rng.random() < 0.75 else "<answer> nine</answer><eos>"


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def session_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("session")]


# Fails if a fault ends the roll-out, costs a question its tree, reaches the tree of another question, or leaves a
# session, a thread, a process or a file behind.
def test_faults() -> None:
    count = int(os.environ.get("ATPO_TEST_TREES", "60"))
    files, processes = handles(), children()
    sessions = make_sessions(Faulty, fork="native", timeout_seconds=5.0, sessions=48, concurrency=16)
    asked = questions(count)
    faults = Counter(fault_of(question.id) for question in asked)
    assert set(faults) == set(FAULTS)
    shape = {"initial_chains": 3, "expansion_rounds": 1, "expansions_per_round": 2}
    engine = ScriptedEngine(script, tokenizer=TOKENIZER)
    trees = []
    for first in range(0, count, 50):
        trees += roll_out(make_search(engine, sessions, cache_tokens=20_000, **shape), asked[first : first + 50])
    assert [tree.question_id for tree in trees] == [question.id for question in asked]
    counts = sessions.counts
    assert counts.forks_native and counts.failed_forks and counts.forks_replay and counts.mismatches
    assert counts.failed_scores and counts.lost > faults["open"]
    for question, tree in zip(asked, trees, strict=True):
        assert tree.num_trajectories == 5
        fault, acts = fault_of(question.id), [turn for turn in tree.turns if turn.tool == "act"]
        if fault in ("none", "fork", "long", "close", "score"):  # these cost no turn its answer
            leaves = [tree.turns[leaf] for leaf in tree.leaves]
            assert all((leaf.score is None) == (fault == "score") for leaf in leaves)
            assert all(turn.step_reward == 1.0 for turn in acts)
        if fault == "open":
            assert all(turn.step_reward is None and not turn.children for turn in acts)
        assert all(len(turn.observation_ids) <= 64 for turn in tree.turns[1:])
    assert wait_until(lambda: sessions.live == 0 and not Faulty.live and sessions.hung == 0)
    assert counts.opened == counts.closed
    sessions.close()
    assert wait_until(lambda: not session_threads())
    assert handles() <= files and children() == processes  # earlier tests may leave files that are closed meanwhile
