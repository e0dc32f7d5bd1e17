"""Environments of SkyRL-gym (`pip install skyrl-gym`); a session is copied or replayed.

Columns of a question's record, as in SkyRL's data sets: `env_class` as for `skyrl_gym.make`, `prompt` (messages;
without it the question), `env_config` (optional), and what the environment reads as its `extras`, as `reward_spec`.
"""

from __future__ import annotations

from typing import Any

from atpo_fast.environment.adapters.common import as_text, column, package
from atpo_fast.environment.session import Message, Result, Session


class SkyRLGymSession(Session):
    """A session over an environment that was made but not initialised.

    `prompt` are the messages that the policy reads as its question; what `init` adds to them is the opening.
    """

    def __init__(self, env: Any, prompt: list[Message]):
        self.env = env
        conversation, _ = env.init([dict(message) for message in prompt])
        self.opening = as_text([message for message in conversation if message not in prompt]) or None

    def step(self, text: str) -> Result:
        """Act by plain text. An environment may shorten the action; the tree keeps what the policy wrote."""
        output = self.env.step(text)
        return Result(as_text(output["observations"]), float(output["reward"]), bool(output["done"]))

    def close(self) -> None:
        """Close the environment."""
        self.env.close()


def open_session(task: dict[str, Any], seed: int) -> SkyRLGymSession:
    """Make the environment that the record names."""
    skyrl_gym = package("skyrl_gym", "skyrl-gym")
    omegaconf = package("omegaconf", "skyrl-gym")
    config = omegaconf.OmegaConf.create(task.get("env_config", {}))
    env = skyrl_gym.make(column(task, "env_class"), env_config=config, extras=task)
    return SkyRLGymSession(env, task.get("prompt") or [{"role": "user", "content": task["question"]}])
