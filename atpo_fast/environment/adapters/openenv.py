"""Environments of OpenEnv over its client (`pip install openenv`).

A session is replayed: a new one with the same seed repeats the actions. So the server has to hold several sessions at
once (`max_concurrent_envs`), and its `reset` has to use the seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from atpo_fast.environment.adapters.common import as_text, column, function_schema, package
from atpo_fast.environment.session import Result, Session


class OpenEnvSession(Session):
    """A session over a client. `act` makes its action from text; None: the environment's MCP tools are called."""

    def __init__(self, client: Any, act: Callable[[str], Any] | None):
        self._client = client
        self._act = act

    @classmethod
    async def begin(cls, client: Any, act: Callable[[str], Any] | None, seed: int, **reset: Any) -> OpenEnvSession:
        """Connect a client and reset its environment; an environment without tools needs `act`."""
        session = cls(client, act)
        await client.connect()
        try:
            session.opening = as_text((await client.reset(seed=seed, **reset)).observation) or None
            if act is None:
                listed = (await client.step({"type": "list_tools"})).observation
                session.tools = [
                    function_schema(tool["name"], tool["description"], tool["input_schema"]) for tool in listed["tools"]
                ]
        except BaseException:
            await client.close()
            raise
        return session

    async def step(self, text: str) -> Result:  # type: ignore[override]  # may be async
        """Act by plain text."""
        assert self._act is not None
        return _result(await self._client.step(self._act(text)))

    async def call(self, name: str, arguments: dict[str, Any]) -> Result:  # type: ignore[override]
        """Call a tool of the environment in a step, so that its reward and its end come back."""
        return _result(await self._client.step({"type": "call_tool", "tool_name": name, "arguments": arguments}))

    async def close(self) -> None:  # type: ignore[override]
        """End the session at the server."""
        await self._client.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("a connection to an OpenEnv server cannot be copied")


async def open_session(task: dict[str, Any], seed: int) -> OpenEnvSession:
    """Connect to the server of a record's `base_url`.

    Further columns, both optional: `action_field`, the field of an action that takes what the policy writes (without
    it, the environment's MCP tools are offered), and `reset`, further arguments of a reset.
    """
    openenv = package("openenv", "openenv", "openenv.core")
    field = task.get("action_field")
    act = None if field is None else lambda text: {field: text}
    client = openenv.GenericEnvClient(base_url=column(task, "base_url"))
    return await OpenEnvSession.begin(client, act, seed, **task.get("reset", {}))


def _result(result: Any) -> Result:
    observation, reward = result.observation, result.reward
    if isinstance(observation, dict) and "tool_name" in observation:
        told = observation.get("error") or observation.get("result")
        observation = told["data"] if isinstance(told, dict) and "data" in told else told
    return Result(as_text(observation), None if reward is None else float(reward), bool(result.done))
