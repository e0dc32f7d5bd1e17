"""One engine shared by two ranks: the leader searches for both, the other follows its calls."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from atpo_fast.common.errors import EngineError
from atpo_fast.data.questions import Question
from atpo_fast.engines.base import LeaderFailedError, Request
from atpo_fast.engines.tensor_parallel import SharedEngine
from tests.helpers.forked_runs import fork_ranks
from tests.helpers.scripted_engine import ScriptedEngine, as_data, by_seed, make_search, prompts, questions, roll_out


def share(rank: int) -> list[Question]:
    """Three questions for the first rank, two for the second."""
    return questions(5)[:3] if rank == 0 else questions(5)[3:]


def follow(folder: Path) -> None:
    """One rank: a roll-out, a failing one, and a roll-out after that; what it found goes into the folder."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    broken = False

    def script(prompt: str, request: Request) -> str:
        if broken:
            raise MemoryError("no room")
        return by_seed(prompt, request)

    part = ScriptedEngine(script)
    world = dist.group.WORLD
    assert world is not None
    engine = SharedEngine(part, world)
    search = make_search(engine)
    found: dict[str, Any] = {}
    for name in ("first", "failed", "again"):
        broken = name == "failed"
        asked = share(rank)

        def work(everyones: Any) -> Any:
            return search.roll_out(everyones, prompts(everyones), seed=0)

        try:
            found[name] = [(index, as_data(tree)) for index, tree in engine.for_all(asked, work)]
        except (RuntimeError, EngineError) as error:
            found[name] = type(error).__name__
        found[f"left after {name}"] = len(part.in_flight) + len(part.live)
    found["submitted"] = [len(batch) for batch in part.batches]
    found["decoded"] = asdict(engine.counters)["decoded_tokens"]
    found["several"] = list(engine.for_all(["a", "b"][: rank + 1], twice))
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def twice(items: Sequence[str]) -> Iterator[tuple[int, str]]:
    yield from [(index, f"{item}{number}") for number in range(2) for index, item in enumerate(items)]


@pytest.mark.distributed
def test_the_leader_searches_for_all_ranks(tmp_path: Path) -> None:
    # Fails if trees go to the wrong rank, a part is called otherwise than the leader's, an error of the leader leaves
    # the others waiting, or requests stay in a part.
    fork_ranks(follow, 2, tmp_path)
    leader, other = (pickle.loads((tmp_path / f"rank{rank}.pickle").read_bytes()) for rank in (0, 1))
    expected = [as_data(tree) for tree in roll_out(make_search(ScriptedEngine(by_seed)), questions(5))]
    for name in ("first", "again"):
        assert sorted(leader[name]) == list(enumerate(expected[:3]))
        assert sorted(other[name]) == list(enumerate(expected[3:]))
    assert leader["failed"] == "RuntimeError" and other["failed"] == LeaderFailedError.__name__
    assert not any(found[f"left after {name}"] for found in (leader, other) for name in ("first", "failed", "again"))
    # Fails if a question keeps one of its trees only.
    assert leader["several"] == [(0, "a0"), (0, "a1")]
    assert other["several"] == [(0, "a0"), (0, "a1"), (1, "b0"), (1, "b1")]
    assert leader["submitted"] == other["submitted"]
