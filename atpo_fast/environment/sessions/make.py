"""Make the sessions that a configuration names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from atpo_fast.common.errors import ConfigError
from atpo_fast.config import Config
from atpo_fast.data.questions import Question
from atpo_fast.environment.own_code import load_own
from atpo_fast.environment.rewards.signatures import columns_of
from atpo_fast.environment.sessions.pool import Sessions
from atpo_fast.environment.tools import CHARS_PER_TOKEN


def open_sessions(config: Config, first_task: dict[str, Any]) -> Sessions:
    """Load the factory of sessions, and find out with a first task how they can be forked.

    Raises:
        ConfigError: there is no such factory, it opens no session, or the fork that was asked for does not work.
    """
    assert config.environment.factory is not None
    factory = load_own(config.environment.factory, "environment.factory")
    if not callable(factory):
        raise ConfigError(f"environment.factory={config.environment.factory}: {factory!r} cannot be called")
    return Sessions(
        factory,
        config.environment,
        max_chars=CHARS_PER_TOKEN * config.tools.max_result_tokens,
        task=first_task,
        seed=config.seed,
    )


def task_of(question: Question) -> dict[str, Any]:
    """Return a question as the task that a session is opened with."""
    return columns_of(question) | {"id": question.id}


def with_opening(question: Question, opening: str) -> Question:
    """Return a question with the opening of its session behind it: of a chat, at the end of the last message."""
    if not question.messages:
        return replace(question, text=f"{question.text}\n{opening}")
    *before, last = question.messages
    return replace(question, messages=(*before, last | {"content": f"{last['content']}\n{opening}"}))
