"""The world of rooms: what actions do, what demonstrations teach, and siblings that share nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from atpo_fast.config import EnvironmentConfig, RolloutConfig, RoomsConfig, ToolsConfig
from atpo_fast.data.questions import Question
from atpo_fast.engines.base import Request
from atpo_fast.environment import Session, ToolBox
from atpo_fast.environment.sessions import Sessions, task_of, with_opening
from atpo_fast.rollout import TreeSearch, begin_sessions, in_order
from atpo_fast.tree import TurnTree
from atpo_fast.world import make_levels, make_rooms_tokenizer, play_levels
from atpo_fast.world.rooms import RoomsSession, open_session
from tests.helpers.scripted_engine import ScriptedEngine, as_data

CONFIG = RoomsConfig(train_questions=12, eval_questions=6, demonstrations=60, door_reward=0.5)
LEVELS = make_levels(CONFIG)
TOKENIZER = make_rooms_tokenizer(CONFIG, "act")
PROBE = ["<act> look </act>", "<act> take red </act>", "<act> open red </act>"]


class Forking(RoomsSession):
    """Rooms that fork by themselves."""

    def fork(self) -> Session:
        return copy.copy(self)


def encode(question: Question, opening: str) -> list[int]:
    return TOKENIZER.encode(f"{with_opening(question, opening).text}\n", add_special_tokens=False)


def solve(session: RoomsSession, question: Question) -> str:
    """Play right; what the treasury shows."""
    seen = session.opening or ""
    for colour in question.record["doors"]:
        while colour not in seen:
            seen = session.step("look").text
        assert session.step(f"take {colour}").text == f"Held {colour}."
        result = session.step(f"open {colour}")
        assert (result.reward, result.done) == (0.5, False)
        seen = result.text
    return seen


def test_the_right_way_leads_to_the_gem() -> None:
    """Fails if a level cannot be solved, its answer is not what is found, or a score is not what was reached."""
    for question in LEVELS.train + LEVELS.eval:
        session = open_session(task_of(question), 3)
        assert session.score([]) == 0.0
        assert f"gem {question.answers[0]}" in solve(session, question)
        assert session.score([]) == 1.0


def test_actions_cannot_be_undone() -> None:
    """Fails if a second key can be taken, a door opens without its key, or one gets out of a pit."""
    question = next(q for q in LEVELS.train if q.meta["doors"] == 2)
    session = open_session(task_of(question), 3)
    room, way = question.record["rooms"][0], question.record["doors"][0]
    wrong = next(colour for colour in room if colour != way)
    assert session.step(f"open {way}").text == "Locked."
    assert session.step(f"take {wrong}").text == f"Held {wrong}."
    assert session.step(f"take {way}").text == session.step("look").text == "Dust."
    fallen = session.step(f"open {wrong}")
    assert (fallen.text, fallen.done, fallen.reward) == ("Pit.", True, None)
    assert session.step("look").text == "Pit." and session.step("fly").done


def test_looks_depend_on_the_seed() -> None:
    """Fails if all is seen at once, looks never change, or the same seed shows something else."""
    question = LEVELS.train[0]
    looks = {seed: [open_session(task_of(question), seed).step("look").text for _ in range(2)] for seed in range(20)}
    assert all(first == second for first, second in looks.values())
    assert len({first for first, _ in looks.values()}) > 2
    assert all(len(first.split()) == 1 + CONFIG.shown for first, _ in looks.values())


@pytest.mark.parametrize("haste", [0.0, 0.75, 1.0])
def test_demonstrations_are_right_as_often_as_haste_lets_them(haste: float) -> None:
    """Fails if a text of the world is unknown to the tokenizer, or haste is not what keeps a player from the gem."""
    config = replace(CONFIG, haste=haste, demonstrations=300)
    played = play_levels(LEVELS, config, TOKENIZER, encode, "act")
    texts = [TOKENIZER.decode(tree.path_ids(len(tree) - 1)) for tree in played]
    assert not any("<unk>" in text for text in texts)
    right = [f"\\boxed{{ {tree.meta['answers'][0]} }}" in text for tree, text in zip(played, texts, strict=True)]
    expected = np.mean([_chance(haste, question.meta["doors"]) for question in LEVELS.train])
    assert abs(np.mean(right) - expected) <= 4 * np.sqrt(expected * (1 - expected) / len(right))


def _chance(haste: float, doors: int) -> float:
    """The probability of the right answer: the first key is any of the keys; who looks again is where it was."""
    care, shown, keys = 1 - haste, CONFIG.shown, CONFIG.keys
    door = (haste / keys + care * shown / keys) / (1 - care * (1 - shown / keys))
    return float(door**doors * (care + haste / 2))


def by_seed(prompt: str, request: Request) -> str:
    """An action that fits what was seen, right or wrong, by the seed."""
    rng = np.random.default_rng(request.seed)
    seen = prompt.rpartition("Keys: ")[2].partition(".")[0].split() if "Keys: " in prompt else ["red"]
    held = prompt.rpartition("Held ")
    if held[1] and "Keys" not in held[2]:
        return f"<act> open {held[2].partition('.')[0]}</act>"
    acts = ["look", *(f"take {colour}" for colour in seen)]
    return f"<act> {rng.choice(acts)}</act>" if rng.random() < 0.9 else "<answer> \\boxed{ red }</answer><eos>"


def search(factory: Any, **settings: Any) -> tuple[list[TurnTree], Sessions]:
    given: dict[str, Any] = {"factory": "rooms:open_session", "probe": PROBE, "timeout_seconds": 240.0} | settings
    first = task_of(LEVELS.train[0])
    sessions = Sessions(factory, EnvironmentConfig(**given), max_chars=500, task=first, seed=0)
    rollout = RolloutConfig(initial_chains=4, expansion_rounds=2, expansions_per_round=3, max_response_tokens=400)
    tools = ToolsConfig(builtin=[], call_limit=8, max_result_tokens=32)
    asked = LEVELS.train[:4]
    states = begin_sessions(sessions, asked, 5)
    prompts = [encode(question, one.opening or "") for question, one in zip(asked, states, strict=True)]
    engine = ScriptedEngine(by_seed, tokenizer=TOKENIZER)
    trees = TreeSearch(engine, TOKENIZER, ToolBox([]), rollout, tools, sessions=sessions)
    grown = in_order(trees.roll_out(asked, prompts, seed=5, states=states))
    sessions.close()
    return grown, sessions


@pytest.fixture(scope="module")
def reference() -> list[TurnTree]:
    """The trees that every way of forking has to give."""
    trees, _ = search(open_session, fork="copy")
    return trees


# Fails if a sibling's key is gone, or a door stays open, because another branch has been there; or if the same seed
# gives other trees by another way of forking.
@pytest.mark.parametrize(
    ("factory", "way"), [(open_session, "copy"), (Forking, "native"), (open_session, "replay"), (Forking, "replay")]
)
def test_siblings_share_nothing(factory: Any, way: str, reference: list[TurnTree]) -> None:
    trees, sessions = search(factory, fork=way)
    assert [as_data(tree) for tree in trees] == [as_data(tree) for tree in reference]
    counts = sessions.counts
    forks = {"native": counts.forks_native, "copy": counts.forks_copy, "replay": counts.forks_replay}
    assert sessions.way == way and forks[way] > 0 and sum(forks.values()) == forks[way]
    assert counts.opened == counts.closed and counts.mismatches == counts.lost == 0
    ends = 0
    for question, tree in zip(LEVELS.train, trees, strict=False):
        ends += replayed(question, tree)
    assert ends


def replayed(question: Question, tree: TurnTree) -> int:
    """Check every path against a session of its own; the number of paths that end in a pit or in the treasury."""
    ends = 0
    for leaf in tree.leaves:
        turns = [tree.turns[n] for n in tree.path(leaf)[1:]]
        seen = [TOKENIZER.decode(turn.observation_ids) for turn in turns if turn.tool == "act"]
        acts = [TOKENIZER.decode(turn.action_ids) for turn in turns if turn.tool == "act"]
        session = open_session(task_of(question), 0)
        for act, shown in zip(acts, seen, strict=True):
            text = session.step(act.removeprefix("<act> ").removesuffix("</act>")).text
            if not text.startswith(("Keys", "Treasury")):  # what a look shows depends on the seed of the tree
                assert shown == f" <result>\n{text}\n</result>"
        ends += any(word in "".join(seen) for word in ("Pit", "Treasury"))
    return ends
