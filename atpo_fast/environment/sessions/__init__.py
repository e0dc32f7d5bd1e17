"""Live sessions: their states along the branches of search trees, the ways to fork them, and their end."""

from atpo_fast.environment.sessions.counts import SessionCounts
from atpo_fast.environment.sessions.make import open_sessions, task_of, with_opening
from atpo_fast.environment.sessions.pool import SessionAnswer, Sessions
from atpo_fast.environment.sessions.states import Outcome, Place, StateTree

__all__ = [
    "Outcome",
    "Place",
    "SessionAnswer",
    "SessionCounts",
    "Sessions",
    "StateTree",
    "open_sessions",
    "task_of",
    "with_opening",
]
