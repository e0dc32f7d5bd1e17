"""Live sessions: which way of forking is chosen, and what happens to states, random numbers and sessions."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from atpo_fast.common.errors import ConfigError
from atpo_fast.environment import Result, Session, SessionLostError, ToolCall
from atpo_fast.environment.sessions import Place, Sessions, StateTree
from tests.helpers.sessions import CHECK, Diary, Drawing, Forking, Keeping, Remote, Sharing, make_sessions


@pytest.fixture(autouse=True)
def all_closed_once() -> Iterator[None]:
    """Fails if any test leaves a session open, or closes one twice."""
    Diary.opened.clear()
    yield
    assert [session.closed for session in Diary.opened] == [1] * len(Diary.opened)


def act(sessions: Sessions, place: Place, text: str, *, keep: bool = False) -> Place:
    """Act, and return the place that this leads to."""
    return sessions.act(place, ToolCall("act", text), keep=keep).result().place


def begin(sessions: Sessions, name: str = "a") -> StateTree:
    (tree,) = sessions.begin([(name, CHECK | {"id": name}, 7)])
    return tree


def text(place: Place) -> str:
    assert place.outcome is not None
    return place.outcome.text


# Fails if a fork whose states are not apart is accepted, if a way that works is passed over, or if a way that was asked
# for is silently replaced by another.
@pytest.mark.parametrize(
    ("kind", "asked", "expected"),
    [
        (Diary, "auto", "copy"),
        (Forking, "auto", "native"),
        (Keeping, "auto", "native"),
        (Remote, "auto", "replay"),
        (Sharing, "auto", "replay"),
        (Diary, "native", "has neither fork() nor get_state() and set_state()"),
        (Forking, "copy", "copy: failed: TypeError: cannot be copied"),
        (Sharing, "copy", "copy: after actions in a fork, the original answers the same actions otherwise"),
        (Diary, "replay", "replay"),
        (Diary, "none", "none"),
    ],
)
def test_the_check_chooses_a_way(kind: type[Diary], asked: str, expected: str) -> None:
    if " " in expected:
        with pytest.raises(ConfigError, match=re.escape(expected)):
            make_sessions(kind, fork=asked)
        return
    sessions = make_sessions(kind, fork=asked)
    assert sessions.way == expected
    sessions.close()


class Restless(Diary):
    """Answers otherwise each time, whatever the seed."""

    numbers = iter(range(10**9))

    def step(self, text: str) -> Result:
        return super().step(f"{text} {next(self.numbers)}")


def test_an_environment_without_a_way_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Fails if an environment that answers at random is copied or replayed without a word."""
    with pytest.raises(ConfigError, match="a second session with the same task and seed"):
        make_sessions(Restless)
    sessions = make_sessions(Restless, fork="replay")
    assert "environment.fork=replay" in caplog.text
    sessions.close()


def test_an_environment_that_cannot_be_opened_is_named() -> None:
    """Fails if a factory that fails ends a run with an error of another place."""

    def broken(task: dict[str, Any], seed: int) -> Session:
        raise ConnectionError("no server at port 80")

    with pytest.raises(ConfigError, match=r"environment.factory=tests:factory.*ConnectionError: no server at port 80"):
        make_sessions(broken)


# Fails if a sibling sees what another has done: if a parked session is used instead of forked, if a fork shares the
# state, if a replay leaves out an action or repeats one too many; or if a way counts as another.
@pytest.mark.parametrize(
    ("kind", "way", "counts"),
    [
        (Diary, "copy", {"forks_copy": 2, "forks_replay": 0, "replayed": 0}),
        (Forking, "native", {"forks_native": 2, "forks_replay": 0, "replayed": 0}),
        (Keeping, "native", {"forks_native": 2, "forks_replay": 0, "replayed": 0}),
        (Remote, "replay", {"forks_copy": 0, "forks_replay": 2, "replayed": 4}),
    ],
)
def test_siblings_are_apart(kind: type[Diary], way: str, counts: dict[str, int]) -> None:
    sessions = make_sessions(kind)
    assert sessions.way == way
    tree = begin(sessions)
    middle = act(sessions, act(sessions, tree.root, "one"), "two")
    seen = [text(act(sessions, middle, word, keep=word != "five")) for word in ("three", "four", "five")]
    assert seen == [f"Did one , two , {word} ." for word in ("three", "four", "five")]
    assert {name: getattr(sessions.counts, name) for name in counts} == counts
    sessions.close()


def test_a_chain_forks_nothing() -> None:
    """Fails if a chain that nobody returns to costs a fork, a second session or a replay."""
    sessions = make_sessions(Diary)
    before = sessions.counts.opened
    place = begin(sessions).root
    for word in ("one", "two", "three"):
        place = act(sessions, place, word)
    assert text(place) == "Did one , two , three ."
    counts = sessions.counts
    assert (counts.opened - before, counts.forks_copy, counts.forks_replay, counts.replayed) == (1, 0, 0, 0)
    sessions.close()


# Fails if the number of sessions is not bounded, or if a state whose session was closed for room is lost or wrong.
@pytest.mark.parametrize("kind", [Diary, Forking, Remote])
def test_states_outlive_their_sessions(kind: type[Diary]) -> None:
    sessions = make_sessions(kind, sessions=2)
    trees = [begin(sessions, name) for name in ("a", "b", "c")]
    places = [act(sessions, tree.root, "one") for tree in trees]
    for _ in range(2):
        for tree, place in zip(trees, places, strict=True):
            assert text(act(sessions, place, "two", keep=True)) == "Did one , two ."
            assert text(act(sessions, tree.root, "three", keep=True)) == "Did three ."
    assert sessions.take_peak() <= 2 and sessions.counts.evicted > 0 and sessions.counts.lost == 0
    sessions.close()


# Fails if a difference between an action and its repetition goes unnoticed, or if the option is not followed.
@pytest.mark.parametrize("on_mismatch", ["end", "continue"])
def test_replay_compares(on_mismatch: str, caplog: pytest.LogCaptureFixture) -> None:
    sessions = make_sessions(Restless, fork="replay", on_mismatch=on_mismatch)
    place = act(sessions, act(sessions, begin(sessions).root, "one"), "two")
    act(sessions, place, "three")
    answer = sessions.act(place, ToolCall("act", "four"), keep=False).result()
    if on_mismatch == "end":
        assert answer.lost and "was answered by" in answer.outcome.text and answer.place is place
        assert (sessions.counts.mismatches, sessions.counts.lost) == (1, 1)
    else:
        assert not answer.lost and answer.outcome.text.startswith("Did one")
        assert (sessions.counts.mismatches, sessions.counts.lost) == (2, 0)
    assert "was answered by" in caplog.text
    sessions.close()


def test_random_numbers_belong_to_their_session() -> None:
    """Fails if a session reseeds the process, or draws from the numbers of another one."""
    alone = make_sessions(Drawing)
    assert alone.way == "copy"
    place = begin(alone).root
    for word in ("one", "two", "three"):
        place = act(alone, place, word)
    alone.close()
    random.seed(5)
    np.random.seed(5)
    expected = random.Random(5).random(), np.random.RandomState(5).random()
    sessions = make_sessions(Drawing)
    first, other = begin(sessions).root, begin(sessions, "b").root
    for word in ("one", "two", "three"):
        kept = first
        first, other = act(sessions, first, word, keep=True), act(sessions, other, "six")
        assert text(act(sessions, kept, word, keep=True)) == text(first)  # a sibling draws the same
    assert text(first) == text(place)
    assert (random.random(), np.random.random()) == expected
    sessions.close()


class Troubled(Diary):
    """Fails in the way that an action names."""

    def step(self, text: str) -> Any:
        if text == "raise":
            raise ValueError("no such door")
        if text == "exit":
            raise SystemExit(3)
        if text == "lose":
            raise SessionLostError("the container died")
        if text == "none":
            return None
        if text == "nan":
            return Result("x", reward=float("nan"))
        return Result("x" * 10_000_000) if text == "long" else super().step(text)


# Fails if an exception of an action ends the run or the branch, or if a lost session is used again.
@pytest.mark.parametrize(
    ("action", "answer", "lost"),
    [
        ("raise", "Tool(act) failed: ValueError: no such door", False),
        ("exit", "Tool(act) failed: RuntimeError: SystemExit: 3", False),
        ("none", "Tool(act) failed: TypeError: the session returned NoneType, and not a Result", False),
        ("nan", "Tool(act) failed: ValueError: the session gave nan, which is no finite number", False),
        ("lose", "Tool(act) failed: LostError: the container died", True),
        ("long", "x" * 2000, False),
    ],
)
def test_trouble_is_an_answer(action: str, answer: str, lost: bool) -> None:
    sessions = make_sessions(Troubled)
    found = sessions.act(begin(sessions).root, ToolCall("act", action), keep=False).result()
    assert (found.outcome.text, found.lost) == (answer, lost)
    assert sessions.counts.lost == lost
    if not lost:
        assert text(act(sessions, found.place, "one")) == "Did one ."
    sessions.close()


class Hanging(Diary):
    """Hangs in Python code; leaves when it is told to."""

    def step(self, text: str) -> Result:
        while text == "hang":
            threading.Event().wait(0.001)
        return super().step(text)


def test_a_hanging_action_is_given_up() -> None:
    """Fails if a call that never returns blocks others, or leaves its thread behind."""
    sessions = make_sessions(Hanging, timeout_seconds=1.0)
    hung = sessions.act(begin(sessions).root, ToolCall("act", "hang"), keep=False)
    assert text(act(sessions, begin(sessions, "b").root, "one")) == "Did one ."
    assert hung.result().lost and "no answer within 1 seconds" in hung.result().outcome.text
    assert wait_until(lambda: sessions.hung == 0)
    sessions.close()


def test_a_released_tree_stops_what_works_for_it() -> None:
    """Fails if the end of a search waits for its sessions, or leaves one that works at that moment open."""
    sessions = make_sessions(Hanging)
    tree = begin(sessions)
    hung = sessions.act(tree.root, ToolCall("act", "hang"), keep=False)
    sessions.release([tree])
    assert hung.exception is not None and wait_until(hung.done)
    assert wait_until(lambda: sessions.live == 0 and sessions.hung == 0)
    sessions.close()


class Judging(Diary):
    """Scores as a coroutine, and dies where it is told to."""

    async def score(self, transcript: list[dict[str, str]]) -> float | None:
        if "die" in self.done:
            raise RuntimeError("no judge")
        return len(self.done) + len(transcript) / 10


def test_scores() -> None:
    """Fails if a score is taken in another state, changes it, or a judge that dies ends the run."""
    sessions = make_sessions(Judging)
    place = act(sessions, begin(sessions).root, "one")
    assert sessions.scores
    assert sessions.score(place, [{"role": "user", "content": "?"}]).result() == 1.1
    assert text(act(sessions, place, "two", keep=True)) == "Did one , two ."
    assert sessions.score(act(sessions, place, "die"), []).result() is None
    assert sessions.counts.failed_scores == 1
    sessions.close()


class Offering(Diary):
    """Has a tool with arguments."""

    tools = [  # noqa: RUF012
        {
            "type": "function",
            "function": {
                "name": "go",
                "description": "Go.",
                "parameters": {"type": "object", "properties": {"steps": {"type": "integer"}}, "required": ["steps"]},
            },
        }
    ]

    async def call(self, name: str, arguments: dict[str, Any]) -> Result:  # type: ignore[override]
        return super().step(f"{name} {arguments['steps'] + 1}")


def test_tools_of_sessions() -> None:
    """Fails if arguments are not read by the schema, or an async tool is not awaited."""
    sessions = make_sessions(Offering)
    assert sessions.names == ("go",)
    root = begin(sessions).root
    found = sessions.act(root, ToolCall("go", '{"steps": 2}'), keep=True).result()
    assert found.outcome.text == "Did go 3 ."
    wrong = sessions.act(found.place, ToolCall("go", "far"), keep=False).result()
    assert wrong.outcome.text.startswith("Tool(go) was not called: the argument is not JSON") and not wrong.lost
    sessions.close()


def wait_until(holds: Any) -> bool:
    """Wait for what has to become true, for as long as only a broken program takes."""
    pause = threading.Event()
    return any(holds() or pause.wait(0.01) for _ in range(6000))
