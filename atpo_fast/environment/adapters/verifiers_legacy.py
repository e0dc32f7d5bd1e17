"""Environments of verifiers before 0.3 (`pip install "verifiers<0.3"`): `MultiTurnEnv` and what inherits from it.

Columns of a question's record: `env_id` as for `verifiers.load_environment`, `env_options`, its further arguments
(optional), and `row`, the number of the row in the environment's data set. A session is copied where its state can be.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from atpo_fast.environment.adapters.common import as_text, column, function_schema, package
from atpo_fast.environment.adapters.verifiers_legacy_parts import load_environment, new_step
from atpo_fast.environment.session import Message, Result, Session


class LegacyVerifiersSession(Session):
    """A session over one rollout's state; the environment object is that of all sessions."""

    def __init__(self, env: Any, state: Any, question: str):
        self._env, self._state, self._messages = env, state, list(state["prompt"])
        self.opening = as_text([part for part in self._messages if part.content != question]) or None
        self.tools = [function_schema(tool.name, tool.description, tool.parameters) for tool in state["tool_defs"]]

    async def step(self, text: str) -> Result:  # type: ignore[override]  # may be async
        """Act by plain text."""
        return await self._act({"content": text})

    async def call(self, name: str, arguments: dict[str, Any]) -> Result:  # type: ignore[override]
        """Call a tool of the environment."""
        call = {"id": f"call_{len(self._messages)}", "name": name, "arguments": json.dumps(arguments)}
        return await self._act({"content": "", "tool_calls": [call]})

    async def score(self, transcript: list[Message]) -> float:  # type: ignore[override]
        """Score by the environment's rubric, on a copy of the state."""
        scored = copy.deepcopy(self)
        turns = [part["content"] for part in transcript if part["role"] == "assistant"]
        if len(turns) > len(scored._state["trajectory"]):  # the answer, which is no action
            await scored._write({"content": turns[-1]})
        await scored._env.render_completion(scored._state)
        await scored._env.rubric.score_rollout(scored._state)
        return float(scored._state["reward"])

    async def close(self) -> None:  # type: ignore[override]
        """Free what the state holds."""
        await self._env.cleanup(self._state)

    async def _act(self, message: dict[str, Any]) -> Result:
        step = await self._write(message)
        if await self._env.is_completed(self._state):
            return Result("", step["reward"], done=True)
        answer = await self._env.env_response(self._messages, self._state)
        answer = package("verifiers", "verifiers", "verifiers.utils.message_utils").maybe_normalize_messages(answer)
        self._messages = [*self._messages, *answer]
        return Result(as_text(answer), step["reward"], self._state["final_env_response"] is not None)

    async def _write(self, message: dict[str, Any]) -> Any:
        written, step = new_step(self._messages, message)
        await self._env.add_trajectory_step(self._state, step)
        self._messages = [*self._messages, written]
        return step

    def __deepcopy__(self, memo: dict[int, Any]) -> LegacyVerifiersSession:
        twin = copy.copy(self)
        twin._state, twin._messages = copy.deepcopy((self._state, self._messages), memo)
        return twin


async def open_session(task: dict[str, Any], seed: int) -> LegacyVerifiersSession:
    """Set up the state of the row that the record names."""
    env = load_environment(column(task, "env_id"), json.dumps(task.get("env_options", {})))
    client = package("verifiers", "verifiers").ClientConfig(api_base_url="http://nowhere.invalid")
    state = await env.init_state(env.get_dataset()[column(task, "row")], client, "policy")
    for of_a_client in ("client", "usage", "usage_tracker"):  # the policy writes here; these could not be copied
        state.pop(of_a_client, None)
    return LegacyVerifiersSession(env, await env.setup_state(state) or state, task["question"])
