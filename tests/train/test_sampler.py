"""Batches of trees of one rank: rolled out when wanted or a step ahead, with what was counted for each."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from atpo_fast.common.errors import StopRequested
from atpo_fast.data.questions import Question
from atpo_fast.engines.base import EngineCounters
from atpo_fast.environment import ToolCounts
from atpo_fast.environment.reward import LeafScore
from atpo_fast.rollout import RolloutCounters
from atpo_fast.train.sampler import BatchSampler, Sampler, by_question
from atpo_fast.train.schedule import Draw
from atpo_fast.train.scoring import ScoredTree
from atpo_fast.train.step_metrics import rollout_metrics
from atpo_fast.tree import TurnTree
from tests.helpers.scripted_engine import ScriptedEngine, by_seed, make_search, prompts, questions


class Scripted(Sampler):
    """A sampler without a run: a scripted engine, and trees in an order of its own."""

    engine: ScriptedEngine

    def __init__(self) -> None:
        self.engine = ScriptedEngine(by_seed, polls=lambda request: 1 + request.turn_key[1] % 7)
        self.tree_search = make_search(self.engine)
        self.raises: BaseException | None = None
        self.threads: list[str] = []

    def roll_out(self, questions: Sequence[Question], *, seed: int, **_: Any) -> Iterator[tuple[int, TurnTree]]:
        self.threads.append(threading.current_thread().name)
        self.engine.counters.decoded_tokens += 10
        for index, tree in self.tree_search.roll_out(questions, prompts(questions), seed=seed):
            yield index, tree
            if self.raises is not None:
                raise self.raises


def batches(sampler: Scripted) -> BatchSampler:
    return BatchSampler(sampler, lambda draw: questions(draw.count), lambda draw: 100 + draw.step)


def draw(step: int) -> Draw:
    return Draw(step, first=0, count=2 + step)


def test_a_batch_has_its_trees_in_order_and_what_was_counted_for_it() -> None:
    # Fails if counts of an earlier batch are counted again, some counter does not arrive, or trees are in the order of
    # their ends.
    sampler = Scripted()
    both = batches(sampler)
    first, second = both.take(draw(0)), both.take(draw(1))
    for batch, count in ((first, 2), (second, 3)):
        assert [[tree.question_id for tree in trees] for trees in batch.trees] == [[q.id] for q in batch.questions]
        assert batch.counts["count/trees"] == count and batch.counts["tokens/decoded"] == 10
        assert batch.counts["count/turns"] == sum(len(tree.turns) - 1 for (tree,) in batch.trees)
        assert batch.staleness == 0
    names = {f"count/{name}" for name in asdict(RolloutCounters())}
    names |= {f"tokens/{name.removesuffix('_tokens')}" for name in asdict(EngineCounters())}
    names |= {f"tool/search/{name}" for name in asdict(ToolCounts())}
    assert first.counts.keys() == names


# Fails when a question with several trees shifts those of the next one, or the order of their ends decides.
def test_trees_are_collected_by_question() -> None:
    named = [TurnTree([1], question_id=name) for name in ("c", "a", "a", "c")]
    found = by_question(zip((2, 0, 0, 2), named, strict=True), 3)
    assert [[tree.question_id for tree in trees] for trees in found] == [["a", "a"], [], ["c", "c"]]


def test_a_batch_ahead_is_rolled_out_on_a_thread_and_kept() -> None:
    # Fails if the caller waits for it, a batch of another step is given, or its staleness is that of a fresh one.
    sampler = Scripted()
    ahead = batches(sampler)
    ahead.begin(draw(1), weights_step=0)
    ahead.join()
    batch = ahead.take(draw(1))
    assert (batch.staleness, len(batch.trees)) == (1, 3) and sampler.threads == ["rollout-1"]
    assert ahead.take(draw(1)).staleness == 0 and len(sampler.threads) == 2  # it is given once
    ahead.begin(draw(2), weights_step=1)
    assert ahead.take(draw(5)).draw.step == 5


def test_errors_come_with_the_batch_and_a_stop_with_the_ranks_together() -> None:
    # Fails if an error on the thread is lost, or a stop is raised on one rank alone.
    sampler = Scripted()
    ahead = batches(sampler)
    sampler.raises = MemoryError("no room")
    ahead.begin(draw(1), weights_step=0)
    with pytest.raises(MemoryError):
        ahead.take(draw(1))
    sampler.raises = StopRequested()
    stopped = ahead.take(draw(2))
    assert stopped.trees == [] and stopped.error is None
    assert not sampler.engine.in_flight


def test_counts_become_metrics_once() -> None:
    # Fails if a count has a second definition: the failed trees are those of the search, not trees without scores.
    (question,) = questions(1)
    tree = TurnTree([1, 2])
    leaf = tree.add_turn(0, [3], [-1.0], finish_reason="length")
    score = LeafScore(turn=leaf, reward=-1.0, em=0.0, f1=0.0, format_ok=False, tool_calls=0, turns=1, answer=None)
    scored = ScoredTree(question, tree, [score])
    counts = SimpleNamespace(**asdict(RolloutCounters(turns=5, tool_calls=4, failed_tool_calls=3, failed_trees=1)))
    given = {f"count/{name}": float(n) for name, n in vars(counts).items()}
    given |= {"tokens/decoded": 7.0, "tokens/trained": 7.0, "tool/search/calls": 4.0, "tool/search/failures": 3.0}
    given |= {"tool/python/calls": 0.0, "tool/python/failures": 0.0}
    metrics = rollout_metrics([scored], given, rollout_seconds=2.0, waited=0.5, step_seconds=4.0)
    assert metrics["rate/rollout_tokens_per_s"] == 3.5 and metrics["rollout/turns"] == 1.0
    assert metrics["rate/train_tokens_per_s"] == 2.0
    assert metrics["tool/search/failure_rate"] == 0.75 and "tool/python/failure_rate" not in metrics
    assert {name: metrics[name] for name in given} == given
    assert not any(name.endswith(("failed_trees", "failed_tool_calls")) for name in metrics.keys() - given.keys())
