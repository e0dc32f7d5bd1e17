"""Environments with a state, for tests of sessions: each answers with all that was done to it."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

from atpo_fast.config import EnvironmentConfig, RolloutConfig, ToolsConfig
from atpo_fast.data.questions import Question
from atpo_fast.environment import CALL_LIMIT_NOTICE, Result, Session, ToolBox
from atpo_fast.environment.sessions import Sessions, StateTree
from atpo_fast.rollout import TreeSearch, begin_sessions, in_order
from atpo_fast.tree import TurnTree
from atpo_fast.world.tokenizer import split_words, word_level_tokenizer
from tests.helpers.scripted_engine import ScriptedEngine

CHECK = {"id": "check", "question": "?", "answers": []}
_TEXTS = (
    "Ask: question one two three four five six seven eight nine ten ? : . , failed empty"
    f"\nDid\nTool(act){CALL_LIMIT_NOTICE}"
)
TAGS = ("<act>", "</act>", "<result>", "</result>", "<answer>", "</answer>", "<think>", "</think>")
TOKENIZER = word_level_tokenizer(split_words(_TEXTS, TAGS), TAGS)


class Diary(Session):
    """Takes plain text, and answers with everything that was done in this session."""

    opened: list[Diary] = []  # noqa: RUF012 (the tests look for sessions that were not closed)

    def __init__(self, task: dict[str, Any], seed: int) -> None:
        self.task, self.seed, self.done, self.closed = task, seed, list[str](), 0
        self.opening: str | None = None
        Diary.opened.append(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Diary:
        other = type(self)(self.task, self.seed)
        other.done = copy.deepcopy(self.done, memo)
        return other

    def step(self, text: str) -> Result:
        self.done.append(text)
        return Result(f"Did {' , '.join(self.done)} .")

    def close(self) -> None:
        self.closed += 1


class Forking(Diary):
    """As Diary, with a fork of its own, and no copy."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Diary:
        raise TypeError("cannot be copied")

    def fork(self) -> Forking:
        other = type(self)(self.task, self.seed)
        other.done = list(self.done)
        return other


class Keeping(Diary):
    """As Diary, with a state that can be taken and set."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Diary:
        raise TypeError("cannot be copied")

    def get_state(self) -> list[str]:
        return self.done

    def set_state(self, state: list[str]) -> None:
        self.done = state


class Remote(Diary):
    """As Diary, with a handle that cannot be copied: only a replay leads to a state."""

    def __init__(self, task: dict[str, Any], seed: int) -> None:
        super().__init__(task, seed)
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Diary:
        return copy.deepcopy(self.lock, memo)  # type: ignore[return-value]


class Sharing(Diary):
    """As Diary, but a copy goes on in the same list."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Diary:
        other = type(self)(self.task, self.seed)
        other.done = self.done
        return other


class Drawing(Diary):
    """As Diary, with numbers from the global generator, which it seeds when it is opened."""

    def __init__(self, task: dict[str, Any], seed: int) -> None:
        super().__init__(task, seed)
        random.seed(seed)

    def step(self, text: str) -> Result:
        return super().step(f"{text} {random.choice(('one', 'two', 'three', 'four', 'five', 'six'))}")


def make_sessions(factory: Callable[[dict[str, Any], int], Session], **settings: Any) -> Sessions:
    """The sessions of a factory, after the check at the start."""
    given: dict[str, Any] = {"factory": "tests:factory", "timeout_seconds": 240.0} | settings
    config = EnvironmentConfig(**given)
    return Sessions(factory, config, max_chars=2000, task=CHECK, seed=0)


def questions(count: int, name: str = "q") -> list[Question]:
    return [Question(id=f"{name}{i}", text="question", answers=("nine",)) for i in range(count)]


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def make_search(
    engine: ScriptedEngine, sessions: Sessions, *, limit: int = 4, cache_tokens: int = 262144, **rollout: Any
) -> TreeSearch:
    shape = {"initial_chains": 3, "expansion_rounds": 2, "expansions_per_round": 2} | rollout
    tools = ToolsConfig(builtin=[], call_limit=limit, max_result_tokens=64)
    config = RolloutConfig(**shape)
    return TreeSearch(engine, TOKENIZER, ToolBox([]), config, tools, cache_tokens=cache_tokens, sessions=sessions)


def roll_out(search: TreeSearch, asked: Sequence[Question], seed: int = 0, **options: Any) -> list[TurnTree]:
    """The trees of a roll-out, in the order of the questions."""
    return in_order(begin(search, asked, seed, **options))


def begin(search: TreeSearch, asked: Sequence[Question], seed: int = 0, **options: Any) -> Any:
    """The roll-out itself, which yields trees."""
    assert search.sessions is not None
    states: list[StateTree] = begin_sessions(search.sessions, asked, seed)
    prompts = [encode(f"Ask: {states[i].opening or ''}{question.text} ?") for i, question in enumerate(asked)]
    return search.roll_out(asked, prompts, seed=seed, states=states, **options)
