"""Environments of GEM (`pip install gem-llm`), forked by their own `spawn` where they have one.

Columns of a question's record: `env_id` as for `gem.make`, and `env_options`, its further arguments (optional).
"""

from __future__ import annotations

import copy
from typing import Any

from atpo_fast.environment.adapters.common import column, package
from atpo_fast.environment.adapters.gymnasium_like import GymnasiumSession
from atpo_fast.environment.session import ForkError


class GemSession(GymnasiumSession):
    """A session over an environment that was made but not reset; it may be wrapped in GEM's tools."""

    def fork(self) -> GemSession:
        """Spawn the environment in its present state.

        Raises:
            ForkError: the environment has no `spawn`: GEM's games, its QA and code environments.
        """
        twin = copy.copy(self)
        twin.env = _spawned(self.env)
        return twin


def _spawned(env: Any) -> Any:
    """Return another environment in the same state."""
    wrapper = package("gem", "gem-llm", "gem.tools.tool_env_wrapper").ToolEnvWrapper
    if type(env) is wrapper:  # it keeps a state, but does not spawn
        rewards = {"tool_reward": env.tool_reward, "tool_success_reward": env.tool_success_reward}
        twin = wrapper(_spawned(env.env), env.tools, **rewards, max_tool_uses=env.max_tool_uses)
        twin.tool_use_counter = env.tool_use_counter
        twin.tool_success_counter = env.tool_success_counter
        return twin
    try:
        return env.spawn(same_state=True)
    except NotImplementedError as error:
        raise ForkError(f"{type(env).__name__} of GEM has no spawn") from error


def open_session(task: dict[str, Any], seed: int) -> GemSession:
    """Make the environment that the record names."""
    gem = package("gem", "gem-llm")
    package("gem", "gem-llm", "gem.envs")  # registers the environments
    return GemSession(gem.make(column(task, "env_id"), **task.get("env_options", {})), seed)
