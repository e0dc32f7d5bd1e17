"""Environments with Gymnasium's interface whose observations and actions are text.

`reset(seed=...)` returns (observation, info), and `step(action)` returns (observation, reward, terminated, truncated,
info). They have no fork: a session is copied or replayed.
"""

from __future__ import annotations

import inspect
from typing import Any

from atpo_fast.environment.adapters.common import as_text, small_seed
from atpo_fast.environment.session import Result, Session


class GymnasiumSession(Session):
    """A session over an environment that was made but not reset."""

    def __init__(self, env: Any, seed: int):
        self.env = env
        observation, _ = env.reset(seed=small_seed(seed))
        self.opening = as_text(observation)

    def step(self, text: str) -> Result:
        """Act by plain text."""
        observation, reward, terminated, truncated, _ = self.env.step(text)
        return Result(as_text(observation), float(reward), bool(terminated or truncated))

    def close(self) -> None:
        """Close the environment where it can be closed."""
        close = getattr(self.env, "close", None)
        if inspect.ismethod(close):
            close()
