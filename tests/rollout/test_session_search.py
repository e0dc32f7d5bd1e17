"""The tree search over sessions: siblings stay apart, all ways of forking give the same trees, and nothing is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from atpo_fast.config import RewardConfig
from atpo_fast.credit import assign_credit
from atpo_fast.engines.base import Request
from atpo_fast.environment import Result
from atpo_fast.environment.reward import ScoringRules, score_trees
from atpo_fast.environment.rewards import RewardTerm, load_rewards
from atpo_fast.tree import TurnTree
from atpo_fast.tree.storage import append_forest, read_forest
from tests.helpers.scripted_engine import ScriptedEngine, as_data
from tests.helpers.sessions import (
    TOKENIZER,
    Diary,
    Forking,
    Keeping,
    Remote,
    begin,
    make_search,
    make_sessions,
    questions,
    roll_out,
)
from tests.helpers.waiting import wait_for

WORDS = ("one", "two", "three", "four", "five", "six")


@pytest.fixture(autouse=True)
def all_closed_once() -> Iterator[None]:
    """Fails if any test leaves a session open, or closes one twice."""
    Diary.opened.clear()
    yield
    assert [session.closed for session in Diary.opened] == [1] * len(Diary.opened)


def by_seed(prompt: str, request: Request) -> str:
    """An action (3 of 4) or an answer, decided by the seed."""
    rng = np.random.default_rng(request.seed)
    word = rng.choice(WORDS)
    return f"<act> {word}</act>" if rng.random() < 0.75 else "<answer> nine</answer><eos>"


def engine(script: Any = by_seed) -> ScriptedEngine:
    return ScriptedEngine(script, tokenizer=TOKENIZER)


def texts(tree: TurnTree, leaf: int) -> list[tuple[str, str]]:
    """(action, observation) of the turns on the way to a leaf."""
    turns = [tree.turns[n] for n in tree.path(leaf)[1:]]
    return [(TOKENIZER.decode(t.action_ids), TOKENIZER.decode(t.observation_ids)) for t in turns]


# Fails if a branch sees what a sibling did, misses what its own path did, or has it twice; if trees differ by the way
# of forking, by the number of sessions or by the schedule; or if a search leaves a session behind.
@pytest.mark.parametrize(
    ("kind", "way"), [(Diary, "copy"), (Forking, "native"), (Keeping, "native"), (Remote, "replay")]
)
@pytest.mark.parametrize("strategy", ["entropy", "tree_grpo", "arpo"])
def test_siblings_never_see_each_other(kind: type[Diary], way: str, strategy: str) -> None:
    more: dict[str, Any] = {
        "tree_grpo": {"trees_per_question": 2},
        "arpo": {"samples_per_tree": 7, "expansion_rounds": 0},
    }
    shape = {"strategy": strategy, **more.get(strategy, {})}
    asked, found = questions(2), []
    for settings in ({}, {"sessions": 2}):
        sessions = make_sessions(kind, **settings)
        assert sessions.way == way
        for schedule in ("streaming", "synchronous"):
            trees = roll_out(make_search(engine(), sessions, schedule=schedule, **shape), asked)
            found.append([as_data(tree) for tree in trees])
        counts = sessions.counts
        assert counts.lost == counts.mismatches == counts.failed_forks == 0
        assert not settings or (counts.evicted and counts.forks_replay)
        assert sessions.take_peak() <= settings.get("sessions", 256)
        sessions.close()
    assert found[1:] == found[:1] * 3
    diaries = 0
    for tree in trees:
        for leaf in tree.leaves:
            done: list[str] = []
            for action, observation in texts(tree, leaf):
                if observation and "limit" not in observation:
                    done.append(action.removeprefix("<act> ").removesuffix("</act>"))
                    assert observation == f" <result>\nDid {' , '.join(done)} .\n</result>"
                    diaries += 1
    assert diaries > 20
    reference = roll_reference(asked, shape)
    assert found[0] == reference


def roll_reference(asked: Any, shape: dict[str, Any]) -> list[Any]:
    """The trees by another way of forking."""
    sessions = make_sessions(Remote)
    trees = [as_data(tree) for tree in roll_out(make_search(engine(), sessions, **shape), asked)]
    sessions.close()
    return trees


# Fails if a search that never returns to an earlier turn pays for forks: chains, the last round, or an evaluation.
@pytest.mark.parametrize("kind", [Diary, Forking, Remote])
def test_chains_cost_no_fork(kind: type[Diary]) -> None:
    sessions = make_sessions(kind)
    roll_out(make_search(engine(), sessions, strategy="chain"), questions(3))
    roll_out(make_search(engine(), sessions), questions(3), greedy=True)
    counts = sessions.counts
    assert counts.actions > 10
    assert counts.forks_native == counts.forks_copy == counts.forks_replay == counts.replayed == counts.evicted == 0
    sessions.close()


class Paying(Diary):
    """Pays for every action, ends after the word six, and scores the number of actions."""

    def step(self, text: str) -> Result:
        return Result(
            super().step(text).text, reward=float(len(self.done)) if text != "two" else None, done=text == "six"
        )

    def score(self, transcript: list[dict[str, str]]) -> float:
        assert transcript[0] == {"role": "user", "content": "question"}
        told = [message["content"] for message in transcript if message["role"] == "tool"]
        assert not self.done or told[len(self.done) - 1] == f"Did {' , '.join(self.done)} ."
        return 10.0 * len(self.done)


def test_rewards_belong_to_their_turns(tmp_path: Any) -> None:
    """Fails if a reward or a score comes to another turn, is lost on the way through a file, or is not learnt from."""
    sessions = make_sessions(Paying)
    asked = questions(3)
    trees = roll_out(make_search(engine(), sessions), asked)
    sessions.close()
    rules = ScoringRules(rewards=load_rewards([RewardTerm(function="session")]))
    assert rules.reads_score and not ScoringRules().reads_score
    score_trees(trees, asked, TOKENIZER, RewardConfig(), rules=rules)
    for suffix in ("jsonl", "parquet"):
        append_forest(tmp_path / f"forest.{suffix}", trees)
        for tree, again in zip(trees, read_forest(tmp_path / f"forest.{suffix}"), strict=True):
            assert [(t.step_reward, t.score) for t in again.turns] == [(t.step_reward, t.score) for t in tree.turns]
    ended = 0
    for tree in trees:
        assert tree.turn_rewards is not None
        for leaf in tree.leaves:
            acted = 0
            for n, (action, observation) in zip(tree.path(leaf)[1:], texts(tree, leaf), strict=True):
                acts = observation.startswith(" <result>")
                acted += acts
                pays = acts and "two" not in action
                assert tree.turns[n].step_reward == (acted if pays else None)
                assert tree.turn_rewards[n] == (acted if pays else 0.0)
                if "six" in action and acts:
                    assert n == leaf
                    ended += 1
            assert tree.turns[leaf].score == tree.turns[leaf].reward == 10.0 * acted
    assert ended
    assign_credit(trees, "at2po", leaf_norm=False, value="leaf_mean", advantage="node_value")
    tree = trees[0]
    for leaf in tree.leaves:
        score = tree.turns[leaf].score
        assert tree.advantages is not None and tree.turn_rewards is not None and score is not None
        assert tree.advantages[leaf] == pytest.approx(score + sum(tree.turn_rewards[tree.path(leaf)]))


class Opening(Diary):
    """Begins with a text, which depends on the seed."""

    def __init__(self, task: dict[str, Any], seed: int) -> None:
        super().__init__(task, seed)
        self.opening = f"{WORDS[seed % 6]} "


def test_openings_are_part_of_the_prompt() -> None:
    """Fails if branches of a tree begin in sessions of other seeds, or two trees of a question in the same."""
    sessions = make_sessions(Opening)
    trees = roll_out(make_search(engine(), sessions), questions(8))
    prompts = [TOKENIZER.decode(tree.turns[0].observation_ids) for tree in trees]
    assert len(set(prompts)) > 2 and all(prompt.startswith("Ask: ") for prompt in prompts)
    assert sessions.counts.mismatches == 0
    sessions.close()


# Fails if sessions outlive a roll-out that ends early: by an error of the engine, a wish to stop, or when nobody wants
# its trees any more.
@pytest.mark.parametrize("ending", ["engine", "stop", "close"])
def test_sessions_end_with_the_rollout(ending: str) -> None:
    sessions = make_sessions(Diary)
    opened = len(Diary.opened)

    def script(prompt: str, request: Request) -> str:
        if ending == "engine" and prompt.count("Did") > 2:
            raise ValueError("no memory")
        return "<act> two</act>"

    def stop(*numbers: int) -> None:
        if ending == "stop" and numbers[2] > 30:
            raise KeyboardInterrupt

    search = make_search(engine(script), sessions, cache_tokens=200, max_response_tokens=120)
    growing = begin(search, questions(3), on_progress=stop)
    if ending == "close":
        next(growing)
        growing.close()
    else:
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            list(growing)
    assert len(Diary.opened) > opened
    wait_for(lambda: sessions.live == 0, seconds=240.0)
    sessions.close()


def test_a_name_that_is_taken_is_refused() -> None:
    """Fails if an action of a session shadows a tag of the protocol."""
    sessions = make_sessions(Diary, action="answer")
    with pytest.raises(ValueError, match="environment's sessions offer 'answer'"):
        make_search(engine(), sessions)
    sessions.close()


def test_sessions_close_when_a_branch_is_late() -> None:
    """Fails if a branch that is ended for being late is scored, or its session stays open."""

    class Slow(Paying):
        def step(self, text: str) -> Result:
            while self.task["id"] != "check" and len(self.done) == 1:
                time.sleep(0.01)
            return super().step(text)

    def script(prompt: str, request: Request) -> str:
        rng = np.random.default_rng(request.seed)
        return "<act> two</act>" if rng.random() < 0.5 else "<answer> nine</answer><eos>"

    sessions = make_sessions(Slow)
    shape: dict[str, Any] = {"strategy": "chain", "initial_chains": 8, "straggler_seconds": 0.2}
    (tree,) = roll_out(make_search(engine(script), sessions, **shape), questions(1))
    late = [leaf for leaf in tree.leaves if tree.turns[leaf].finish_reason == "stop"]
    assert late and all(tree.turns[leaf].score is None for leaf in late)
    assert all(tree.turns[leaf].score is not None for leaf in tree.leaves if leaf not in late)
    sessions.close()
