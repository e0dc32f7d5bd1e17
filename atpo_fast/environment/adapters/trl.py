"""Environment objects of TRL (`environment_factory` of its GRPOTrainer); TRL itself is not needed.

`reset(**row)` returns text or None, every other public method is a tool, and `get_reward()`, which may be async, scores
the final state; nothing is closed. A session of a plain Python object is copied; one that holds a connection is
replayed.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from atpo_fast.environment.adapters.common import as_text
from atpo_fast.environment.session import Message, Result, Session

_NO_TOOLS = ("reset", "get_reward")


class TRLSession(Session):
    """A session over an object that was made but not reset; `row` holds the columns that its `reset` gets."""

    def __init__(self, environment: Any, row: dict[str, Any]):
        from transformers.utils import get_json_schema

        self.environment = environment
        self.opening = environment.reset(**row)
        self.tools = [get_json_schema(method) for method in tool_methods(environment)]

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """Call the method `name`; returns a Result, or what awaits it where the method is async."""
        answer = getattr(self.environment, name)(**arguments)
        return _awaited(answer) if inspect.isawaitable(answer) else Result(as_text(answer))

    async def score(self, transcript: list[Message]) -> float | None:
        """Read the reward that the object has for its present state; None where it has none."""
        get_reward = getattr(self.environment, "get_reward", None)
        reward = None if get_reward is None else get_reward()
        reward = await reward if inspect.isawaitable(reward) else reward
        return None if reward is None else float(reward)


async def _awaited(answer: Awaitable[Any]) -> Result:
    return Result(as_text(await answer))


def tool_methods(environment: Any) -> list[Callable[..., Any]]:
    """List the methods of an object that are tools, in the order of their names; no property is evaluated."""
    names = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
    return [getattr(environment, name) for name in names if not name.startswith("_") and name not in _NO_TOOLS]


def sessions_of(factory: Callable[[], Any]) -> Callable[[dict[str, Any], int], TRLSession]:
    """Make an `open_session` from an `environment_factory`; `reset` gets all columns of the record."""

    def open_session(task: dict[str, Any], seed: int) -> TRLSession:
        return TRLSession(factory(), task)

    return open_session
