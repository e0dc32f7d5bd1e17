"""Sessions of OpenEnv's harness (`ResourceSessionFactory`), which are close to ours; they are replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from atpo_fast.environment.adapters.common import as_text, function_schema
from atpo_fast.environment.session import Message, Result, Session


class ResourceSession(Session):
    """A session over a `ResourceSession` of OpenEnv's harness. The reward comes from `verify` alone.

    What tool results say of a reward is left out, because `verify` forwards it once more.
    """

    def __init__(self, inner: Any):
        self._inner = inner
        self.opening = as_text(inner.initial_messages()) or None
        self.tools = [function_schema(tool.name, tool.description, tool.input_schema) for tool in inner.list_tools()]

    def call(self, name: str, arguments: dict[str, Any]) -> Result:
        """Call a tool."""
        result = self._inner.call_tool(name, arguments)
        text = as_text(result.data)
        return Result(f"{text}\n{result.error}".strip() if result.error else text, done=bool(result.done))

    def score(self, transcript: list[Message]) -> float | None:
        """Read the reward of the episode."""
        reward = self._inner.verify(transcript).env_reward
        return None if reward is None else float(reward)

    def close(self) -> None:
        """Release the resources."""
        self._inner.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("the resources of an OpenEnv session cannot be copied")


def sessions_of(factory: Any) -> Callable[[dict[str, Any], int], ResourceSession]:
    """Make an `open_session` from a `ResourceSessionFactory`; its task is the question's record."""

    def open_session(task: dict[str, Any], seed: int) -> ResourceSession:
        return ResourceSession(factory.create(task, seed=seed))

    return open_session
